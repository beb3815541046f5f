"""The table covers every element of every tensor once, whatever their sizes, dtypes and addresses."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.trainer_hooks.kernels.chunk_table import Stretch, make_table, table_key

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    kinds=st.lists(st.tuples(st.integers(1, 90), st.sampled_from(DTYPES), st.integers(0, 3)), max_size=8),
    chunk_elements=st.integers(1, 40),
)
def test_every_element_is_in_one_chunk(kinds: list[tuple[int, torch.dtype, int]], chunk_elements: int) -> None:
    tensors = [torch.zeros(offset + size, dtype=dtype)[offset:] for size, dtype, offset in kinds]
    stretches = [Stretch(10 + index, index % 3, tensor) for index, tensor in enumerate(tensors)]
    table = make_table(table_key(stretches, CPU, chunk_elements), stretches, CPU, chunk_elements)
    assert table.chunks.shape == (table.num_chunks, 3)
    assert sum(launch.num_chunks for launch in table.launches) == table.num_chunks
    spans = {slot: (first, count) for first, count, slot in table.spans.tolist()}
    assert table.most_chunks == max((count for _, count in spans.values()), default=0)
    seen: list[int] = []
    for slot, module, values in stretches:
        first, count = spans[slot]
        chunks = table.chunks[first : first + count].tolist()
        places = [(address - values.data_ptr()) // values.element_size() for address, _, _ in chunks]
        assert places == list(range(0, values.numel(), chunk_elements))
        assert sum(size for _, size, _ in chunks) == values.numel()
        assert all(of == module and 0 < size <= chunk_elements for _, size, of in chunks)
        (launch,) = (each for each in table.launches if each.first_chunk <= first < each.first_chunk + each.num_chunks)
        assert launch.dtype == values.dtype
        assert launch.is_aligned == (values.data_ptr() % 16 == 0)
        seen += range(first, first + count)
    assert sorted(seen) == list(range(table.num_chunks))


def test_a_key_changes_with_all_that_a_table_holds() -> None:
    tensor = torch.zeros(8)
    stretches = [Stretch(0, 0, tensor)]
    same = table_key(stretches, CPU, 4)
    assert table_key([Stretch(0, 0, tensor.view(-1))], CPU, 4) == same
    others = [Stretch(1, 0, tensor), Stretch(0, 1, tensor), Stretch(0, 0, tensor[1:]), Stretch(0, 0, tensor[:7])]
    keys = {same, table_key(stretches, CPU, 5), *(table_key([other], CPU, 4) for other in others)}
    assert len(keys) == 6
