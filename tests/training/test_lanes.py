"""Lanes on one base: what memory allows at once, what an error leaves behind, whose threads compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from llmft.model.stacked import Part
from llmft.training import lanes
from llmft.training.lanes import Lane, Stack
from llmft.training.out_of_memory import is_out_of_memory


@dataclass
class Output:
    last_hidden_state: torch.Tensor

    def keys(self) -> list[str]:
        return [each.name for each in fields(self)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class Body(torch.nn.Module):
    """Multiplies by a number of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, **arguments: Any) -> Output:
        return Output(arguments["input_ids"] * self.factor)


class Joint:
    """The bodies of all parts in one graph, as far as there is memory for `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []
        self.threads: set[int] = set()
        self.waiting = 0

    def forward(self, parts: list[Part]) -> list[Output]:
        self.threads.add(torch.get_num_threads())
        if len(parts) + self.waiting > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(parts))
        self.waiting += len(parts)
        together = torch.cat([part.arguments["input_ids"] * part.layers["body"].factor for part in parts], dim=1)
        return [Output(state) for state in together.split([p.arguments["input_ids"].shape[1] for p in parts], dim=1)]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model is its body, and its layer too."""
    monkeypatch.setattr(lanes, "body_of", lambda model: model)
    monkeypatch.setattr(lanes, "why_alone", lambda model: None)
    monkeypatch.setattr(lanes, "lora_layers", lambda body: {"body": body})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def steps(body: Body, lane: Lane, joint: Joint, count: int) -> list[float]:
    """Gradients of some steps, in which row i has length i."""
    found = []
    for step in range(1, count + 1):
        states = body(input_ids=torch.full((1, step), 2.0), llmft_blocks=None).last_hidden_state
        states.sum().backward()
        lane.backward()
        joint.waiting = 0
        assert body.factor.grad is not None
        found.append(float(body.factor.grad))
        body.factor.grad = None
    return found


def run(joint: Joint, jobs: list[Callable[[Lane], None]]) -> None:
    stack = Stack()
    stack.base, stack._joint = "base", joint  # type: ignore[assignment]
    stack.run([((), job) for job in jobs])


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_where_memory_does_not_suffice_fewer_lanes_wait_for_their_backward(most: int, bare: None) -> None:
    joint, found = Joint(most), []

    def job(lane: Lane) -> None:
        body = Body(3.0)
        lane.join(body, "base")
        found.append(steps(body, lane, joint, 3))

    run(joint, [job] * 5)
    assert found == [[2.0, 4.0, 6.0]] * 5
    assert sum(joint.sizes) == 15
    assert max(joint.sizes) == {1: 1, 2: 2, 3: 2, 8: 5}[most]


def test_a_lane_that_finds_no_memory_even_by_itself_is_told(bare: None) -> None:
    joint, told = Joint(0), []

    def job(lane: Lane) -> None:
        body = Body(3.0)
        lane.join(body, "base")
        with pytest.raises(torch.OutOfMemoryError) as error:
            steps(body, lane, joint, 1)
        told.append(is_out_of_memory(error.value))

    run(joint, [job] * 3)
    assert told == [True] * 3


def test_what_a_failed_step_left_open_is_nobodys_when_the_lane_begins_again(
    bare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "ANSWER_S", 0.0)
    joint, found = Joint(8), []

    def failing(lane: Lane) -> None:
        body = Body(3.0)
        lane.join(body, "base")
        body(input_ids=torch.ones(1, 2), llmft_blocks=None).last_hidden_state.sum().backward()
        # Memory ends here, after the loss's backward: the training begins again, while the other goes on.
        lane.wait_for(lambda: joint.waiting == 0)
        body = Body(3.0)
        lane.join(body, "base")
        found.append(steps(body, lane, joint, 2))

    def job(lane: Lane) -> None:
        body = Body(3.0)
        lane.join(body, "base")
        found.append(steps(body, lane, joint, 2))

    run(joint, [failing, job])
    assert found == [[2.0, 4.0]] * 2


def test_the_joint_forward_has_the_threads_that_its_lanes_have(bare: None) -> None:
    joint = Joint(8)
    torch.set_num_threads(1)

    def job(lane: Lane) -> None:
        torch.set_num_threads(2)
        body = Body(3.0)
        lane.join(body, "base")
        steps(body, lane, joint, 1)

    run(joint, [job] * 2)
    assert joint.threads == {2}
