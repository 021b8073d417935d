"""What a ledger counts: storages, once each, from the operation that makes them until nothing holds them."""

from __future__ import annotations

import torch

from lora_dpo.ledger import ACTIVATIONS, ELSEWHERE, REFERENCE, WEIGHTS, Ledger, Peak


def test_a_storage_counts_until_nothing_holds_it() -> None:
    with Ledger() as ledger:
        x = torch.zeros(100)
        assert ledger.alive == Peak(400, {ACTIVATIONS: 400})
        view = x.view(10, 10)[2:]
        assert ledger.alive.total == 400
        del x
        assert ledger.alive.total == 400
        del view
        assert ledger.alive == Peak(0, {})


def test_in_place_operations_and_casts_to_the_same_type_add_nothing() -> None:
    with Ledger() as ledger:
        x = torch.zeros(100)
        x.add_(1).mul_(2)
        assert x.to(torch.float32) is x
        assert ledger.alive.total == 400


def test_a_graph_holds_what_it_saves_and_lets_go_of_it_in_the_backward_pass() -> None:
    with Ledger() as ledger:
        w = torch.ones(100, requires_grad=True)
        y = (w.exp() * w).sum()  # exp saves its result, the product that and w
        assert ledger.alive.total == 400 + 400 + 4
        y.backward()
        del y
        assert w.grad is not None
        assert ledger.alive.total == 800
        ledger.count("gradients", [w.grad])
        assert ledger.alive.parts == {ACTIVATIONS: 400, "gradients": 400}


def test_what_was_made_before_counts_when_it_is_named() -> None:
    before = torch.zeros(100)
    with Ledger() as ledger:
        before.view(-1)
        ledger.count(WEIGHTS, [before, None])
        assert ledger.alive.parts == {WEIGHTS: 400}
        ledger.count(ELSEWHERE, [before])
        assert ledger.alive.total == 0
        del before
        assert ledger.alive.total == 0


def test_each_phase_has_its_peak_with_all_that_was_alive() -> None:
    with Ledger() as ledger:
        torch.zeros(1000)  # in no phase
        kept = torch.zeros(10)
        with ledger.during("one"):
            torch.zeros(100)
            torch.zeros(50)
        with ledger.during(REFERENCE):
            torch.zeros(30)
        with ledger.during("two", WEIGHTS):
            more = torch.zeros(5)
        with ledger.during("three"):
            pass
    assert ledger.peaks == {
        "one": Peak(440, {ACTIVATIONS: 440}),
        REFERENCE: Peak(160, {ACTIVATIONS: 40, REFERENCE: 120}),
        "two": Peak(60, {ACTIVATIONS: 40, WEIGHTS: 20}),
        "three": Peak(60, {ACTIVATIONS: 40, WEIGHTS: 20}),
    }
    assert kept.numel() + more.numel() == 15


def test_a_phase_may_change_with_every_operation() -> None:
    names = iter(["outside", "a", "b"])
    with Ledger() as ledger, ledger.during(lambda: next(names)):
        one, two = torch.zeros(1), torch.zeros(2)
    assert {name: peak.total for name, peak in ledger.peaks.items()} == {"outside": 0, "a": 4, "b": 12}
    assert one.numel() + two.numel() == 3


def test_sizes_are_rounded_to_blocks_and_other_devices_left_out() -> None:
    with Ledger(block=512) as ledger:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
        assert ledger.alive.total == 512 + 512 + 1024
    with Ledger(device="cuda") as ledger:
        kept.append(torch.zeros(1))
        assert ledger.alive.total == 0


def test_a_modules_tensors_are_counted_once() -> None:
    one = torch.nn.Linear(4, 4)
    net = torch.nn.Sequential(one, torch.nn.BatchNorm1d(4), one)
    ledger = Ledger()
    ledger.count_module(WEIGHTS, net)
    assert ledger.alive.total == 4 * (16 + 4) + 4 * 4 * 4 + 8  # BatchNorm's counter is int64
