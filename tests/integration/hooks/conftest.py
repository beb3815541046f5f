"""A small model with nanoVLM's contract, rows for it, and a ROUTER that answers as a worker does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from torch import nn
from torch.nn import functional as F

from sidestep.protocol import frames
from sidestep.protocol.frames import ChunkJoiner, Envelope
from sidestep.protocol.messages import Ack, Blob, Goodbye, Hello, Kind, Message, Welcome
from sidestep.trainer_hooks.samples import Sample

V, D, T, EOS, IMAGE = 23, 12, 16, 0, 1
IGNORED = -100


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, cache: Any) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if cache is not None:
            k, v = torch.cat((cache[0], k), dim=1), torch.cat((cache[1], v), dim=1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=seen[:, None])[:, 0]
        return x + self.drop(self.out(attended)), (k, v)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.token_embedding.weight

    def forward(self, x: Any, attention_mask: Any = None, kv_cache: Any = None, start_pos: int = 0) -> Any:
        total = start_pos + x.shape[1]
        places = torch.arange(total, device=x.device)
        seen = (places[start_pos:, None] >= places[None]).expand(x.shape[0], -1, -1)
        if attention_mask is not None:
            seen = seen & (attention_mask[:, None, :total] != 0) | (places[start_pos:, None] == places[None])
        cache = kv_cache or [None] * len(self.blocks)
        made = []
        for block, before in zip(self.blocks, cache, strict=True):
            x, kept = block(x, seen, before)
            made.append(kept)
        return x, made


class TinyVLM(nn.Module):
    """nanoVLM's contract: logits and loss with targets, hidden states without."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D))
        self.MP = nn.Linear(D, D)
        self.decoder = Decoder()

    def forward(self, input_ids: Any, images: Any, attention_mask: Any = None, targets: Any = None) -> Any:
        x = self.decoder.token_embedding(input_ids)
        flat = [image for row in images for image in row]
        if flat:
            shown = self.MP(self.vision_encoder(torch.cat(flat).to(x.device)))
            x = x.clone()
            x[input_ids == IMAGE] = shown
        x, _ = self.decoder(x, attention_mask=attention_mask)
        if targets is None:
            return x, None
        logits = self.decoder.head(x)
        loss = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), ignore_index=IGNORED)
        return logits, loss

    @torch.inference_mode()
    def generate(
        self, input_ids: Any, images: Any, attention_mask: Any = None, max_new_tokens: int = 5, greedy: bool = False
    ) -> torch.Tensor:
        assert greedy
        ids, mask = input_ids, attention_mask
        for _ in range(max_new_tokens):
            hidden, _ = self.forward(ids, images, mask)
            ids = torch.cat((ids, self.decoder.head(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        new: torch.Tensor = ids[:, input_ids.shape[1] :]
        ended = (new == EOS).cumsum(1) > 0
        return torch.where(ended, EOS, new)


class TinyTokenizer:
    eos_token_id = EOS
    pad_token_id = EOS
    image_token_id = IMAGE
    all_special_ids = (EOS, IMAGE)

    def __len__(self) -> int:
        return V

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


@dataclass
class Trainer:
    """One training, the same for the same seed."""

    seed: int = 0
    device: str = "cpu"
    model: Any = None
    optimizer: Any = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = TinyVLM().to(self.device)
        groups = [
            {"params": list(m.parameters())} for m in (self.model.MP, self.model.vision_encoder, self.model.decoder)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3)
        self.model.train()
        self.rows = torch.Generator().manual_seed(self.seed)

    def batch(self) -> dict[str, Any]:
        ids = torch.randint(2, V, (3, T), generator=self.rows)
        ids[:, 3] = IMAGE
        labels = torch.full_like(ids, IGNORED)
        labels[:, 6:9] = ids[:, 7:10]
        labels[:, 9] = EOS
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        images = [[torch.rand(1, 4, generator=self.rows)] for _ in range(3)]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": images}

    def samples(self) -> list[Sample]:
        picked = torch.Generator().manual_seed(5)
        return [
            Sample(
                question=f"q{n}",
                target="t",
                prompt_ids=[3, IMAGE, *torch.randint(2, V, (n,), generator=picked).tolist()],
                target_ids=[4],
                inputs={"images": [torch.rand(1, 4, generator=picked)]},
                image=np.zeros((2, 2, 3), np.uint8),
            )
            for n in range(1, 5)
        ]

    def run(
        self,
        steps: int,
        hooks: Any = None,
        *,
        explicit: bool = True,
        accumulation: int = 2,
        call: Any = None,
        first: int = 0,
    ) -> None:
        model = self.model if call is None else call
        for step in range(first, first + steps):
            total = 0.0
            for _ in range(accumulation):
                batch = self.batch()
                ids, labels = batch["input_ids"].to(self.device), batch["labels"].to(self.device)
                mask = batch["attention_mask"].to(self.device)
                _, loss = model(ids, batch["images"], attention_mask=mask, targets=labels)
                if hooks is not None and explicit:
                    hooks.on_batch(
                        input_ids=batch["input_ids"],
                        labels=batch["labels"],
                        attention_mask=batch["attention_mask"],
                        epoch=0,
                    )
                (loss / accumulation).backward()
                total += loss.item()
            if hooks is not None and explicit:
                hooks.before_clip()
            if explicit:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if hooks is not None and explicit:
                hooks.after_step(step)
            self.losses.append(total / accumulation)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def trainer() -> Callable[..., Trainer]:
    torch.set_num_threads(1)
    return Trainer


@pytest.fixture
def tokenizer() -> TinyTokenizer:
    return TinyTokenizer()


class Listener:
    """Answers like a worker, and remembers what it was told."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.hellos: list[Hello] = []
        self.blobs: dict[str, bytes] = {}
        self.messages: list[tuple[Envelope, Message]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.bind(self.address)
        known: set[bytes] = set()
        joiners: dict[bytes, ChunkJoiner] = {}
        while not self._stop.is_set():
            if not socket.poll(20):
                continue
            identity, *_, frame = socket.recv_multipart()
            whole: bytes | None = frame
            if frames.peek(frame).kind == Kind.CHUNK:
                _, whole = joiners.setdefault(identity, ChunkJoiner()).add(frame)
            if whole is None:
                continue
            envelope, message = frames.decode(whole)
            answer = Envelope(run_id=envelope.run_id, incarnation=envelope.incarnation, rank=envelope.rank)
            if isinstance(message, Hello):
                self.hellos.append(message)
                if identity not in known:
                    wanted = tuple(message.tables.values())
                    socket.send_multipart([identity, frames.encode(answer, Welcome(instance="test", wanted=wanted))])
                    known.add(identity)
            elif isinstance(message, Blob):
                self.blobs[message.digest] = message.content
            elif isinstance(message, Message) and envelope.sequence:
                self.messages.append((envelope, message))
                committed = np.array([[envelope.sequence, envelope.sequence]], np.int64)
                socket.send_multipart([identity, frames.encode(answer, Ack(committed=committed))])
        socket.close(0)
        context.term()

    def until_goodbye(self, timeout_seconds: float = 10.0) -> list[Message]:
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if any(isinstance(message, Goodbye) for _, message in self.messages):
                return [message for _, message in self.messages]
            time.sleep(0.01)
        raise AssertionError(f"no goodbye in {timeout_seconds} s; got {[m.kind.name for _, m in self.messages]}")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(5.0)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(f"ipc://{tmp_path}/w.sock")
    yield made
    made.stop()
