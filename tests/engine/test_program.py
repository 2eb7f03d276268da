"""Programs: what is left of a recording, how it is cut into passes, what it prints."""

from __future__ import annotations

import torch

from fastopt import SGD, Adam, Lamb, Optimizer

from .compare import gradients, params


def programs(opt: Optimizer, ps: list[torch.Tensor], steps: int = 2) -> list[str]:
    for i in range(steps):
        for p, g in zip(ps, gradients(ps, i), strict=True):
            p.grad = g
        opt.step()
    return [str(program) for program in opt.program()]


def test_adam_moves_28_bytes_per_element_and_its_first_step_reads_no_state() -> None:
    ps = params(torch.float32, ((4, 5),))
    opt = Adam(ps, wd=0.1, engine="foreach")
    programs(opt, ps)
    assert [program.bytes_per_element() for program in opt.program()] == [(8, 12), (16, 12)]
    text = str(opt.program())
    assert "s0 = (1 - (lr * wd))" in text
    assert "write p <-" in text
    assert "ms per 10^9 elements" in text


def test_lamb_takes_two_passes_and_keeps_its_averages_from_the_first() -> None:
    ps = params(torch.float32, ((4, 5),))
    opt = Lamb(ps, engine="foreach")
    programs(opt, ps)
    first, second = opt.program()[-1].phases
    assert {out.place for out in first.stores} == {"state grad_avg", "state sqr_avg"}
    assert {place for place, _ in second.loads} == {"p", "state grad_avg", "state sqr_avg"}
    assert opt.program()[-1].bytes_per_element() == (28, 12)


def test_dead_stores_are_dropped() -> None:
    def wasteful(p, lr, kept=None, **kwargs):
        unused = torch.exp(p.grad) * 3
        unused.mul_(2)
        p.data.mul_(2.0)
        p.data.copy_(p.grad)
        return {"kept": torch.ones_like(p) if kept is None else kept}

    ps = params(torch.float32, ((4, 5),))
    opt = Optimizer(ps, wasteful, lr=0.1, engine="foreach")
    programs(opt, ps)
    assert [node.op for node in opt.program()[-1].nodes] == ["input"]
    assert opt.program()[-1].bytes_per_element() == (4, 4)


def test_swapped_states_are_both_right() -> None:
    def swap(p, one=None, two=None, **kwargs):
        if one is None:
            return {"one": p.data.clone(), "two": p.grad.clone()}
        return {"one": two.clone(), "two": one.clone()}

    ps = params(torch.float32, ((4, 5),))
    opt = Optimizer(ps, swap, lr=0.1, engine="foreach")
    programs(opt, ps, 1)
    before = {k: v.clone() for k, v in opt.state[ps[0]].items()}
    opt.step()
    after = opt.state[ps[0]]
    assert torch.equal(after["one"], before["two"])
    assert torch.equal(after["two"], before["one"])
    assert opt.engine[0].executor == "foreach"


def test_nothing_recorded_prints_so() -> None:
    assert "nothing is recorded" in str(SGD(params(torch.float32, ((2,),))).program())
