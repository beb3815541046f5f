"""The user's four rules, the verdict and when it is said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sidestep.protocol.tables import decode_table, encode_table
from sidestep.worker.detectors.base import Detector, Observation, Verdict
from sidestep.worker.detectors.user_rules import UserRules
from sidestep.worker.metrics.sequences import GeneratedSamples, TokenSequence
from sidestep.worker.records import RunContext
from sidestep.worker.settings import RunSettings

EOS = 0
A, YES, NO = 10, 11, 12


class Letters:
    """Ids as letters."""

    def token(self, token_id: int) -> str:
        return {A: "A", YES: "yes", NO: "no"}.get(token_id, f"t{token_id}")

    def text(self, ids: Sequence[int]) -> str:
        return "".join(map(self.token, ids))


def context(targets: Sequence[Sequence[int]] = (), eos_id: int | None = EOS) -> RunContext:
    return RunContext(
        run_id="r",
        attempt=0,
        text=Letters(),
        tokenizer={"eos_id": eos_id},
        samples={"samples": [{"target_ids": list(target)} for target in targets]},
    )


def observation(
    outputs: Sequence[Sequence[int]], step: int = 100, where: RunContext | None = None, **settings: Any
) -> Observation:
    generated = GeneratedSamples(
        samples=tuple(range(len(outputs))), sequences=tuple(TokenSequence.cut(ids, EOS) for ids in outputs)
    )
    return Observation(
        attempt=0,
        step=step,
        context=where or context(),
        settings=RunSettings.from_map(settings),
        generated=generated,
    )


def judge(outputs: Sequence[Sequence[int]], **options: Any) -> dict[str, Any]:
    return dict(UserRules().observe(observation(outputs, **options)).values)


HEALTHY = [[i, i + 1, i + 2, EOS] for i in range(20, 36)]


def test_answering_a_to_everything_is_the_users_own_story() -> None:
    values = judge([[A, EOS]] * 16)
    assert values["collapse/is_collapsed"] == 1
    assert values["collapse/collapse_reason"] == "single_token_dominance+identical_sequences"
    assert values["collapse/most_common_token_text"] == "A"  # noqa: S105
    assert values["collapse/most_common_token_id"] == A
    assert values["collapse/most_common_ratio"] == 1.0
    assert values["collapse/eos_ratio"] == 0.5  # EOS is not content
    assert values["collapse/total_tokens"] == 16
    assert values["collapse/reason_code"] == 1 + 4


def test_a_healthy_check_by_hand() -> None:
    values = judge([[20, 21, 20, EOS], [22, EOS], [23, 24], [EOS]])
    assert values == {
        "collapse/is_collapsed": 0,
        "collapse/collapse_reason": "none",
        "collapse/reason_code": 0,
        "collapse/most_common_token_text": "t20",
        "collapse/most_common_token_id": 20,
        "collapse/most_common_ratio": 2 / 6,
        "collapse/unique_tokens": 5,
        "collapse/token_diversity": 5 / 6,
        "collapse/eos_ratio": 3 / 9,
        "collapse/total_tokens": 6,
        "collapse/unique_sequences": 4,
        "collapse/rule/single_token_dominance": 0,
        "collapse/rule/low_diversity": 0,
        "collapse/rule/identical_sequences": 0,
        "collapse/rule/excessive_eos": 0,
        "collapse/rule/no_tokens_generated": 0,
    }


def test_filled_eos_after_the_first_is_not_counted() -> None:
    filled = judge([[*ids, EOS, EOS, EOS, EOS] for ids in HEALTHY])
    assert filled == judge(HEALTHY)
    assert filled["collapse/eos_ratio"] == 0.25


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([[A] * 7 + [20, 21, 22, EOS]], "none"),  # 0.70 is not over 0.70
        ([[A] * 8 + [20, 21, 22, EOS]], "single_token_dominance"),
        ([list(range(20, 29)) * 5 + [20, 21, 22, 23]], "none"),  # 49 tokens
        ([list(range(20, 29)) * 5 + [20, 21, 22, 23, 24]], "low_diversity"),  # 9 distinct among 50
        ([list(range(20, 30)) * 5], "none"),  # 10 distinct
        ([[20, 21, EOS], [20, 21, EOS]], "identical_sequences"),
        ([[20, 21, EOS]], "none"),  # one sample cannot be identical
        ([[20, EOS], *[[EOS]] * 3], "single_token_dominance"),
        ([[20, 21, EOS], *[[EOS]] * 7], "none"),  # 8 EOS of 10
        ([[20, 21, EOS], *[[EOS]] * 8], "excessive_eos"),
        ([[EOS]] * 4, "no_tokens_generated"),
        ([[]], "no_tokens_generated"),
        ([[A] * 60, [A] * 60], "single_token_dominance+low_diversity+identical_sequences"),
    ],
)
def test_each_rule_at_its_threshold(outputs: list[list[int]], reason: str) -> None:
    values = judge(outputs)
    assert values["collapse/collapse_reason"] == reason
    assert values["collapse/is_collapsed"] == int(reason != "none")


def test_no_tokens_stand_alone_while_each_rule_is_shown_literally() -> None:
    values = judge([[EOS]] * 4)
    assert values["collapse/rule/excessive_eos"] == values["collapse/rule/identical_sequences"] == 1
    assert values["collapse/collapse_reason"] == "no_tokens_generated"
    absent = ("most_common_ratio", "most_common_token_text", "most_common_token_id", "token_diversity")
    assert not {f"collapse/{name}" for name in absent} & values.keys()
    assert "collapse/eos_ratio" not in judge([[], []])


def test_thresholds_come_from_the_settings() -> None:
    assert judge(HEALTHY, single_token_dominance=0.01)["collapse/rule/single_token_dominance"] == 1
    assert judge(HEALTHY, excessive_eos=0.2)["collapse/rule/excessive_eos"] == 1
    diverse = judge(HEALTHY, low_diversity_min_tokens=10, low_diversity_unique_tokens=100)
    assert diverse["collapse/collapse_reason"] == "low_diversity"
    assert judge(HEALTHY, low_diversity_min_tokens="nonsense") == judge(HEALTHY)


def test_without_a_known_eos_its_ratio_is_absent() -> None:
    assert "collapse/eos_ratio" not in judge([[20, 21]], where=context(eos_id=None))


def test_healthy_yes_and_no_are_excused_by_their_targets() -> None:
    answers = [[YES, EOS]] * 13 + [[NO, EOS]] * 3
    asked = context(targets=answers)
    literal = judge(answers, where=asked, collapse_verdict="literal")
    assert literal["collapse/collapse_reason"] == "single_token_dominance"
    relative = judge(answers, where=asked, collapse_verdict="target_relative")
    assert relative["collapse/collapse_reason"] == "none"
    assert relative["collapse/is_collapsed"] == 0
    assert relative["collapse/rule/single_token_dominance"] == 1, "the rule stands literally"
    collapsed = judge([[A, EOS]] * 16, where=asked, collapse_verdict="target_relative")
    assert collapsed["collapse/collapse_reason"] == "identical_sequences"
    varied = context(targets=HEALTHY)
    collapsed = judge([[A, EOS]] * 16, where=varied, collapse_verdict="target_relative")
    assert collapsed["collapse/collapse_reason"].startswith("single_token_dominance")


def test_only_the_targets_of_the_prompts_that_were_generated_from_excuse() -> None:
    asked = context(targets=[*HEALTHY[:2], [A, EOS], [A, EOS]])
    settings = RunSettings(collapse_verdict="target_relative")
    outputs = (TokenSequence.cut([A, EOS], EOS),) * 2
    for rows, verdict in (((2, 3), 0), ((0, 1), 1)):
        generated = GeneratedSamples(samples=rows, sequences=outputs)
        seen = Observation(attempt=0, step=100, context=asked, settings=settings, generated=generated)
        assert UserRules().observe(seen).values["collapse/is_collapsed"] == verdict


def test_without_targets_the_relative_verdict_is_the_literal_one() -> None:
    values = judge([[A, EOS]] * 16, collapse_verdict="target_relative")
    assert values["collapse/collapse_reason"] == "single_token_dominance+identical_sequences"
    assert judge([[EOS]] * 2, collapse_verdict="target_relative")["collapse/is_collapsed"] == 1


@pytest.mark.parametrize("step", [50, 101])
def test_a_step_that_is_not_due_has_no_verdict(step: int) -> None:
    assert UserRules().observe(observation([[A, EOS]] * 4, step=step)) == Verdict()


def test_no_samples_no_verdict() -> None:
    assert UserRules().observe(observation([])) == Verdict()
    quiet = observation([[A, EOS]], collapse_detection_interval=0)
    assert UserRules().observe(quiet) == Verdict()


def said(rules: Detector, step: int, *, collapsed: bool, **settings: Any) -> list[str]:
    outputs = [[A, EOS]] * 4 if collapsed else HEALTHY
    return [finding.line for finding in rules.observe(observation(outputs, step=step, **settings)).findings]


LINE = "⚠️ MODEL COLLAPSE DETECTED: single_token_dominance+identical_sequences"


def test_an_untrained_model_is_no_collapsed_one_until_it_was_healthy_once() -> None:
    rules = UserRules()
    assert said(rules, 0, collapsed=True) == []
    assert said(rules, 100, collapsed=False) == []
    assert said(rules, 200, collapsed=True) == [LINE]
    assert said(rules, 300, collapsed=True) == [], "once per episode"
    assert said(rules, 400, collapsed=False) == []
    assert said(rules, 500, collapsed=True) == [LINE], "a new episode"


def test_what_never_was_healthy_is_said_at_the_deadline_once() -> None:
    rules = UserRules()
    assert [bool(said(rules, step, collapsed=True)) for step in range(0, 800, 100)] == [False] * 5 + [
        True,
        False,
        False,
    ]
    rules = UserRules()
    options = {"collapse_detection_interval": 300}  # the deadline falls between two checks
    found = [bool(said(rules, step, collapsed=True, **options)) for step in range(0, 1_200, 300)]
    assert found == [False, False, True, False]


def test_noise_that_never_ends_arms_nothing() -> None:
    """From noise a model comes to one answer for all prompts first: at step 100 of yes/no questions, say."""
    answers = [[YES, EOS], [NO, EOS]] * 8
    asked = context(targets=answers)
    noise = [[i] * 3 + [i + 40] * 61 for i in range(20, 36)]

    def heard(rules: UserRules, step: int, outputs: list[list[int]], where: RunContext = asked, **options: Any) -> bool:
        return bool(rules.observe(observation(outputs, step=step, where=where, **options)).findings)

    rules = UserRules()
    assert not heard(rules, 0, noise)
    assert not heard(rules, 100, [[A, EOS]] * 16), "nothing was ever well"
    assert not heard(rules, 200, answers)
    assert heard(rules, 300, [[A, EOS]] * 16)
    rules = UserRules()
    assert not heard(rules, 0, noise, collapse_verdict="literal")
    assert heard(rules, 100, [[A, EOS]] * 16, collapse_verdict="literal"), "the user's own words, exactly"
    rules = UserRules()
    prose = context(targets=[ids[:-1] for ids in HEALTHY])
    assert not heard(rules, 0, noise, prose), "targets that never end say nothing of an output that does not"
    assert heard(rules, 100, [[A, EOS]] * 16, prose)


def test_one_answer_that_few_targets_excuse_arms_nothing() -> None:
    """An untrained model may say "yes" to everything, then "no" to most: it has not been well in between."""
    answers = [[YES, EOS]] * 11 + [[NO, EOS]] * 5
    asked = context(targets=answers)

    def heard(rules: UserRules, step: int, outputs: list[list[int]], **options: Any) -> bool:
        return bool(rules.observe(observation(outputs, step=step, where=asked, **options)).findings)

    rules = UserRules()
    assert not heard(rules, 0, [[YES, EOS]] * 14 + [[NO, EOS]] * 2)
    assert not heard(rules, 100, [[YES, EOS]] * 2 + [[NO, EOS]] * 14)
    assert not heard(rules, 200, answers)
    assert heard(rules, 300, [[YES, EOS]] * 2 + [[NO, EOS]] * 14)
    rules = UserRules()
    assert not heard(rules, 0, [[YES, EOS]] * 16)
    assert heard(rules, 500, [[YES, EOS]] * 2 + [[NO, EOS]] * 14), "at the deadline all the same"


def test_skewed_data_whose_targets_are_as_skewed_arm() -> None:
    answers = [[A, EOS]] * 34 + [[NO, EOS]] * 6
    rules = UserRules()
    asked = context(targets=answers)
    assert not rules.observe(observation(answers, step=0, where=asked)).findings
    assert rules.observe(observation([[NO, EOS]] * 40, step=100, where=asked)).findings


def test_another_stage_is_armed_anew_and_has_its_own_deadline() -> None:
    rules = UserRules()
    said(rules, 0, collapsed=False)
    rules.observe(replace(observation([], step=150), stage="captions"))
    assert said(rules, 200, collapsed=True) == [], "other prompts are learned first"
    again = UserRules()
    again.restore(decode_table(encode_table(rules.state())))
    assert said(again, 600, collapsed=True) == []
    assert said(again, 700, collapsed=True) == [LINE], "the deadline counts from the stage's first step"
    assert said(rules, 300, collapsed=False) == []
    assert said(rules, 400, collapsed=True) == [LINE]
    rules.begin(1, 120)
    assert said(rules, 200, collapsed=True) == [LINE], "the stage has not begun there"


def test_a_state_from_before_there_were_stages_is_read() -> None:
    rules = UserRules()
    rules.restore({"history": [[100, True, False]]})
    assert said(rules, 200, collapsed=True) == [LINE]


def test_the_armed_state_survives_a_restart() -> None:
    rules = UserRules()
    said(rules, 0, collapsed=False)
    said(rules, 100, collapsed=True)
    again = UserRules()
    again.restore(decode_table(encode_table(rules.state())))
    assert said(again, 200, collapsed=True) == []
    assert again.state() == rules.state()


def test_a_rollback_returns_to_the_armed_state_before_the_step() -> None:
    rules = UserRules()
    said(rules, 100, collapsed=False)
    assert said(rules, 200, collapsed=True) == [LINE]
    rules.begin(1, 150)
    assert said(rules, 200, collapsed=True) == [LINE], "the new attempt has its own episode"
    rules.begin(2, 50)
    assert said(rules, 100, collapsed=True) == [], "it was not yet armed there"


def test_the_alert_says_what_was_seen() -> None:
    rules = UserRules()
    said(rules, 0, collapsed=False)
    (finding,) = rules.observe(observation([[A, EOS]] * 4)).findings
    assert finding.title == "Model collapse"
    assert finding.detail == "4 samples, 4 content tokens, 1 distinct; most common: 'A' with 100%"


def test_few_targets_of_skewed_data_excuse_a_model_that_knows_no_better() -> None:
    """Data that are 85 % "A": 11 of 16 targets are, which is under the rule's 70 %, by chance."""
    skewed = context(targets=[[A, EOS]] * 11 + [[B, EOS] for B in (21, 22, 23, 24, 25)])
    said = judge([[A, EOS]] * 16, where=skewed, collapse_verdict="target_relative")
    assert said["collapse/is_collapsed"] == 0
    assert said["collapse/rule/single_token_dominance"] == said["collapse/rule/identical_sequences"] == 1
    even = context(targets=[[letter, EOS] for letter in (A, 21, 22, 23)] * 4)
    said = judge([[A, EOS]] * 16, where=even, collapse_verdict="target_relative")
    assert said["collapse/collapse_reason"] == "single_token_dominance+identical_sequences"


def test_many_targets_are_taken_at_their_word() -> None:
    skewed = context(targets=[[A, EOS]] * 21 + [[21, EOS]] * 11)  # 66 %
    said = judge([[A, EOS]] * 32, where=skewed, collapse_verdict="target_relative")
    assert said["collapse/collapse_reason"] == "single_token_dominance+identical_sequences"


def test_targets_of_few_tokens_are_no_witness_of_diversity() -> None:
    answers = [[YES, 21, EOS], [NO, 22, EOS]] * 12  # 48 tokens, 4 distinct
    longer = [[YES, 21, 22, EOS], [NO, 22, 21, EOS]] * 12  # 72 tokens, 4 distinct
    said = judge(longer, where=context(targets=answers), collapse_verdict="target_relative")
    assert said["collapse/rule/low_diversity"] == 1
    assert said["collapse/is_collapsed"] == 0


def asked(*prompts: tuple[str, bytes | None], answers: Sequence[Sequence[int]]) -> RunContext:
    """A context with a question, an image or none, and a target for each sample."""
    rows = [
        {
            "question": question,
            "target_ids": list(answer),
            "image": None if pixels is None else {"shape": [1, 1, 3], "pixels": pixels},
        }
        for (question, pixels), answer in zip(prompts, answers, strict=True)
    ]
    return RunContext(run_id="r", attempt=0, text=Letters(), tokenizer={"eos_id": EOS}, samples={"samples": rows})


TARGETS = [[i, i + 1, i + 2, i + 3, EOS] for i in range(40, 104, 4)]


def test_one_prompt_answered_alike_again_and_again_is_no_collapse() -> None:
    said = [[20, 21, 22, 23, EOS]] * 16
    same = asked(*[("Continue.", None)] * 16, answers=TARGETS)
    values = judge(said, where=same)
    assert values["collapse/is_collapsed"] == 0
    assert values["collapse/rule/identical_sequences"] == 1, "each rule is shown literally"
    assert judge(said, where=same, collapse_verdict="literal")["collapse/is_collapsed"] == 1


def test_other_images_under_one_question_are_other_prompts() -> None:
    said = [[20, 21, 22, 23, EOS]] * 16
    shown = asked(*[("What is it?", bytes([i, 0, 0])) for i in range(16)], answers=TARGETS)
    assert judge(said, where=shown)["collapse/collapse_reason"] == "low_diversity+identical_sequences"
    alike = asked(*[("What is it?", b"abc")] * 16, answers=TARGETS)
    assert judge(said, where=alike)["collapse/is_collapsed"] == 0


def test_one_token_to_one_prompt_is_still_one_token() -> None:
    same = asked(*[("Continue.", None)] * 16, answers=TARGETS)
    assert judge([[A, A, A, EOS]] * 16, where=same)["collapse/collapse_reason"] == "single_token_dominance"
