"""Who trains when, on which rows: all of it a function of (seed, round, client)."""

import random
from collections import Counter

import numpy as np
import pytest
from conftest import plan_round

from hf_fedsa.client.waves import LocalWork, match_lengths
from hf_fedsa.seeds import derive_seed
from hf_fedsa.server.sampling import sample_clients

CLIENTS = [f"client_{i}" for i in range(20)]


def uniform(round_index, num_rows, clients_per_round):
    return sample_clients(num_rows, clients_per_round, seed=0, round_index=round_index)


class TestDeriveSeed:
    def test_a_seed_never_changes(self):
        assert derive_seed(42, "sample", 0, "client_0") == 8958471692509062660

    def test_every_part_counts(self):
        variants = [
            derive_seed(0),
            derive_seed(1),
            derive_seed(0, "a"),
            derive_seed(0, "b"),
            derive_seed(0, "a", "b"),
            derive_seed(0, "b", "a"),
            derive_seed(0, "a", 0),
            derive_seed(0, "a", 1),
            derive_seed(0, "a", 0, "x"),
            derive_seed(0, "a", 0, "y"),
        ]
        assert len(set(variants)) == len(variants)

    def test_parts_do_not_run_together(self):
        assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")
        assert derive_seed(1, 23) != derive_seed(12, 3)

    def test_seeds_fit_torch_and_use_the_whole_range(self):
        seeds = [derive_seed(0, i) for i in range(1000)]
        assert 0 <= min(seeds) < 2**56
        assert 2**63 - 2**56 < max(seeds) < 2**63

    def test_the_global_generators_do_not_matter(self):
        random.seed(0)
        first = derive_seed(7, "a")
        random.random()
        assert derive_seed(7, "a") == first


class TestSampleClients:
    @pytest.mark.parametrize("clients_per_round", [1, 5, 20])
    def test_a_sample_is_sorted_and_without_repeats(self, clients_per_round):
        sample = sample_clients(CLIENTS, clients_per_round, seed=0, round_index=0)
        assert len(set(sample)) == clients_per_round
        assert sample == sorted(sample)
        assert set(sample) <= set(CLIENTS)

    def test_none_takes_all(self):
        assert sample_clients(CLIENTS, None, seed=0, round_index=3) == sorted(CLIENTS)

    def test_asking_for_more_than_there_are_takes_all(self):
        assert sample_clients(CLIENTS, 99, seed=0, round_index=3) == sorted(CLIENTS)

    def test_the_order_of_the_ids_does_not_matter(self):
        shuffled = random.Random(0).sample(CLIENTS, len(CLIENTS))
        for round_index in range(10):
            expected = sample_clients(CLIENTS, 6, seed=1, round_index=round_index)
            assert sample_clients(shuffled, 6, seed=1, round_index=round_index) == expected
            assert sample_clients(set(CLIENTS), 6, seed=1, round_index=round_index) == expected

    def test_a_round_can_be_replayed_alone(self):
        history = [sample_clients(CLIENTS, 6, seed=1, round_index=t) for t in range(10)]
        assert sample_clients(CLIENTS, 6, seed=1, round_index=7) == history[7]

    def test_rounds_and_seeds_differ(self):
        rounds = {tuple(sample_clients(CLIENTS, 6, seed=1, round_index=t)) for t in range(30)}
        seeds = {tuple(sample_clients(CLIENTS, 6, seed=s, round_index=1)) for s in range(30)}
        assert len(rounds) == 30
        assert len(seeds) == 30

    def test_every_client_is_drawn_about_equally_often(self):
        draws = Counter(c for t in range(400) for c in sample_clients(CLIENTS, 5, seed=3, round_index=t))
        # 400 rounds at 5 of 20 are 100 draws each, give or take a standard deviation of 8.7.
        assert draws.keys() == set(CLIENTS)
        assert all(65 <= count <= 135 for count in draws.values())

    def test_two_clients_meet_as_often_as_chance_says(self):
        together = sum(
            {"client_0", "client_1"} <= set(sample_clients(CLIENTS, 10, seed=3, round_index=t)) for t in range(400)
        )
        # The chance is 10/20 * 9/19, that is 94.7 of 400, give or take 8.5.
        assert 60 <= together <= 130

    def test_a_new_client_can_only_take_a_place(self):
        displaced = 0
        for t in range(50):
            before = set(sample_clients(CLIENTS, 6, seed=2, round_index=t))
            after = set(sample_clients([*CLIENTS, "new"], 6, seed=2, round_index=t))
            assert after - before <= {"new"}
            assert len(before - after) == len(after - before)
            displaced += before != after
        assert 0 < displaced < 50

    def test_a_client_that_was_not_drawn_can_leave(self):
        for t in range(10):
            sample = sample_clients(CLIENTS, 6, seed=2, round_index=t)
            for absent in sorted(set(CLIENTS) - set(sample)):
                rest = [client_id for client_id in CLIENTS if client_id != absent]
                assert sample_clients(rest, 6, seed=2, round_index=t) == sample


def shuffled(num_rows: int, seed: int = 0):
    return lambda pass_index: random.Random(1000 * seed + pass_index).sample(range(num_rows), num_rows)


def rows_of(steps) -> list[int]:
    return [row for step in steps for batch in step for row in batch]


WORKS = [
    LocalWork(batch_size, accumulation_steps, local_steps, local_epochs, drop_last)
    for batch_size in (1, 2, 3, 5)
    for accumulation_steps in (1, 2, 3)
    for local_steps, local_epochs in ((None, 1), (None, 3), (1, None), (7, None))
    for drop_last in (False, True)
]
CASES = [(work, n) for work in WORKS for n in range(1, 12) if not (work.drop_last and n < work.batch_size)]


class TestLocalWork:
    def test_by_hand(self):
        # Seven rows in batches of two are four micro-batches, or two steps of two, the last with three rows.
        work = LocalWork(batch_size=2, accumulation_steps=2, local_steps=None, local_epochs=2)
        assert (work.batches_per_pass(7), work.steps_per_pass(7), work.num_steps(7), work.num_passes(7)) == (
            4,
            2,
            4,
            2,
        )
        orders = [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]
        assert work.steps(7, lambda pass_index: orders[pass_index]) == [
            [[0, 1], [2, 3]],
            [[4, 5], [6]],
            [[6, 5], [4, 3]],
            [[2, 1], [0]],
        ]

    def test_a_pass_does_not_borrow_from_the_next(self):
        work = LocalWork(batch_size=2, accumulation_steps=3, local_steps=3, local_epochs=None)
        steps = work.steps(8, lambda pass_index: range(8))
        assert steps == [[[0, 1], [2, 3], [4, 5]], [[6, 7]], [[0, 1], [2, 3], [4, 5]]]

    def test_drop_last_by_hand(self):
        work = LocalWork(batch_size=2, accumulation_steps=1, local_steps=None, local_epochs=2, drop_last=True)
        orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
        assert work.steps(5, lambda pass_index: orders[pass_index]) == [[[0, 1]], [[2, 3]], [[4, 3]], [[2, 1]]]
        assert [work.num_examples(5, orders.__getitem__, n) for n in range(5)] == [0, 2, 4, 5, 5]
        assert [work.num_examples(5, lambda pass_index: range(5), n) for n in range(5)] == [0, 2, 4, 4, 4]

    def test_local_steps_are_taken_as_given(self):
        work = LocalWork(batch_size=4, accumulation_steps=2, local_steps=5, local_epochs=None)
        assert {work.num_steps(n) for n in (1, 3, 50)} == {5}

    def test_steps_are_as_many_as_were_announced(self):
        for work, n in CASES:
            assert len(work.steps(n, shuffled(n))) == work.num_steps(n), (work, n)

    def test_only_the_passes_announced_are_asked_for(self):
        for work, n in CASES:
            asked = []

            def order(pass_index, n=n, asked=asked):
                asked.append(pass_index)
                return range(n)

            work.steps(n, order)
            assert asked == list(range(work.num_passes(n))), (work, n)

    def test_batches_have_their_size_and_steps_their_batches(self):
        for work, n in CASES:
            per_pass = work.steps_per_pass(n)
            for i, step in enumerate(work.steps(n, shuffled(n))):
                closes_pass = (i + 1) % per_pass == 0
                batches = (work.batches_per_pass(n) - 1) % work.accumulation_steps + 1
                assert len(step) == (batches if closes_pass else work.accumulation_steps), (work, n)
                sizes = [len(batch) for batch in step]
                if work.drop_last or not closes_pass:
                    assert set(sizes) == {work.batch_size}, (work, n)
                else:
                    assert sizes[:-1] == [work.batch_size] * (len(sizes) - 1), (work, n)
                    assert sizes[-1] == (n - 1) % work.batch_size + 1, (work, n)

    def test_every_pass_covers_every_row_once(self):
        for work, n in CASES:
            per_pass = work.steps_per_pass(n)
            steps = work.steps(n, shuffled(n))
            for start in range(0, len(steps) - per_pass + 1, per_pass):
                rows = rows_of(steps[start : start + per_pass])
                assert len(set(rows)) == len(rows), (work, n)
                assert len(rows) == (n - n % work.batch_size if work.drop_last else n), (work, n)

    def test_a_pass_follows_its_own_order(self):
        for work, n in CASES:
            per_pass = work.steps_per_pass(n)
            steps = work.steps(n, shuffled(n))
            for pass_index in range(work.num_passes(n)):
                rows = rows_of(steps[pass_index * per_pass : (pass_index + 1) * per_pass])
                assert rows == shuffled(n)(pass_index)[: len(rows)], (work, n)

    def test_examples_are_the_different_rows_of_the_steps_taken(self):
        for work, n in CASES:
            steps = work.steps(n, shuffled(n))
            for taken in range(len(steps) + 1):
                assert work.num_examples(n, shuffled(n), taken) == len(set(rows_of(steps[:taken]))), (work, n, taken)


class TestWeights:
    def draw(self, weights, clients_per_round, rounds=2000):
        counts = Counter()
        for t in range(rounds):
            counts.update(sample_clients(weights, clients_per_round, seed=5, round_index=t, weights=weights))
        return counts

    def test_one_is_drawn_in_proportion_to_its_weight(self):
        counts = self.draw({"a": 1, "b": 2, "c": 7}, 1)
        assert [counts[c] / 2000 for c in "abc"] == pytest.approx([0.1, 0.2, 0.7], abs=0.04)

    def test_two_as_one_after_the_other(self):
        # a is in unless b and c are: 1 - (2/10 * 7/8 + 7/10 * 2/3).
        counts = self.draw({"a": 1, "b": 2, "c": 7}, 2)
        assert counts["a"] / 2000 == pytest.approx(1 - (0.2 * 7 / 8 + 0.7 * 2 / 3), abs=0.04)

    def test_all_are_all(self):
        assert sample_clients("abc", None, seed=0, round_index=0, weights={"a": 1, "b": 2, "c": 3}) == ["a", "b", "c"]

    def test_the_scale_of_the_weights_does_not_matter(self):
        for t in range(20):
            weights = {c: 1 + i for i, c in enumerate(CLIENTS)}
            scaled = {c: 1000 * w for c, w in weights.items()}
            expected = sample_clients(CLIENTS, 6, seed=1, round_index=t, weights=weights)
            assert sample_clients(reversed(CLIENTS), 6, seed=1, round_index=t, weights=scaled) == expected


class TestPlanRound:
    WORK = LocalWork(batch_size=1, accumulation_steps=1, local_steps=None, local_epochs=1)

    def plan(self, num_rows, **kwargs):
        values = {"work": self.WORK, "clients_per_round": None, "parallel_clients": 2, "sampler": uniform}
        return plan_round(0, num_rows, **{**values, **kwargs})

    def test_by_hand(self):
        plan = self.plan({"a": 3, "b": 9, "c": 2, "d": 8, "e": 1})
        assert plan.client_ids == ("a", "b", "c", "d", "e")
        assert [(wave.client_ids, wave.num_steps) for wave in plan.waves] == [
            (("b", "d"), 9),
            (("a", "c"), 3),
            (("e",), 1),
        ]
        assert plan.num_steps == 13
        assert plan.local_steps == 9

    def test_ties_are_broken_by_id(self):
        plan = self.plan({"c": 4, "a": 4, "b": 4})
        assert [wave.client_ids for wave in plan.waves] == [("a", "b"), ("c",)]

    @pytest.mark.parametrize("parallel_clients", [1, 2, 3, 7, 50])
    def test_waves_cover_the_sample_once(self, parallel_clients):
        num_rows = {client_id: 1 + i % 6 for i, client_id in enumerate(CLIENTS)}
        plan = self.plan(num_rows, clients_per_round=7, parallel_clients=parallel_clients)
        sizes = [len(wave.client_ids) for wave in plan.waves]
        full, rest = divmod(7, parallel_clients)
        assert sizes == [parallel_clients] * full + [rest] * (rest > 0)
        in_waves = [client_id for wave in plan.waves for client_id in wave.client_ids]
        assert sorted(in_waves) == list(plan.client_ids) == sample_clients(num_rows, 7, seed=0, round_index=0)

    @pytest.mark.parametrize("parallel_clients", [1, 3, 20])
    def test_a_wave_lasts_as_long_as_its_longest_client(self, parallel_clients):
        num_rows = {client_id: 1 + (7 * i) % 13 for i, client_id in enumerate(CLIENTS)}
        plan = self.plan(num_rows, parallel_clients=parallel_clients)
        for wave in plan.waves:
            assert wave.num_steps == max(num_rows[client_id] for client_id in wave.client_ids)
        assert plan.num_steps == sum(wave.num_steps for wave in plan.waves)
        assert plan.local_steps == max(num_rows.values())

    def test_one_at_a_time_takes_everyones_steps(self):
        num_rows = {"a": 3, "b": 9, "c": 2}
        assert self.plan(num_rows, parallel_clients=1).num_steps == 14
        assert self.plan(num_rows, parallel_clients=3).num_steps == 9

    def test_the_grouping_does_not_change_the_sample_or_the_schedule(self):
        num_rows = {client_id: 1 + i for i, client_id in enumerate(CLIENTS)}
        plans = [self.plan(num_rows, clients_per_round=8, parallel_clients=m) for m in (1, 2, 8)]
        assert len({plan.client_ids for plan in plans}) == 1
        assert len({plan.local_steps for plan in plans}) == 1

    def test_the_order_of_the_clients_does_not_matter(self):
        num_rows = {client_id: 1 + i % 4 for i, client_id in enumerate(CLIENTS)}
        backward = dict(reversed(num_rows.items()))
        assert self.plan(num_rows, clients_per_round=8) == self.plan(backward, clients_per_round=8)

    def test_the_round_decides_the_sample(self):
        num_rows = dict.fromkeys(CLIENTS, 2)
        plans = [plan_round(t, num_rows, self.WORK, 5, parallel_clients=2, sampler=uniform) for t in range(8)]
        assert [plan.round_index for plan in plans] == list(range(8))
        assert len({plan.client_ids for plan in plans}) == 8

    def test_local_steps_make_all_clients_equal(self):
        work = LocalWork(batch_size=2, accumulation_steps=1, local_steps=5, local_epochs=None)
        plan = self.plan({"a": 1, "b": 50, "c": 7}, work=work)
        assert [wave.num_steps for wave in plan.waves] == [5, 5]
        assert plan.local_steps == 5

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [([], "no client"), (["a", "a"], "a client twice"), (["a", "x"], "'x', which is no client")],
    )
    def test_a_sampler_that_cannot_be_followed(self, chosen, message):
        with pytest.raises(ValueError, match=f"`client_sampler` returned {message} for round 0"):
            self.plan({"a": 1, "b": 1}, sampler=lambda *_: chosen)

    @pytest.mark.parametrize("chosen", [None, "a"])
    def test_a_sampler_that_returns_no_list(self, chosen):
        with pytest.raises(TypeError, match=f"`client_sampler` returned {chosen!r} for round 0, not a list of client"):
            self.plan({"a": 1, "b": 1}, sampler=lambda *_: chosen)

    def test_a_sampler_may_do_what_it_likes_with_what_it_is_told(self):
        num_rows = {"a": 1, "b": 1}
        plan = self.plan(num_rows, sampler=lambda round_index, rows, number: [rows.popitem()[0]])
        assert plan.client_ids == ("b",) and num_rows == {"a": 1, "b": 1}

    def test_a_sampler_is_told_the_round_the_rows_and_the_number(self):
        asked = []

        def sampler(*arguments):
            asked.append(arguments)
            return ["b"]

        plan = self.plan({"a": 1, "b": 2}, sampler=sampler, clients_per_round=1)
        assert asked == [(0, {"a": 1, "b": 2}, 1)]
        assert plan.client_ids == ("b",)


class TestMatchLengths:
    LENGTHS = np.random.default_rng(0).lognormal(5, 0.4, 400).astype(int)

    def order(self, lengths, seed=0, start=0, shuffle_seed=0):
        shuffled = np.random.default_rng(shuffle_seed).permutation(len(lengths)).tolist()
        return match_lengths(shuffled, np.asarray(lengths), seed=seed, start=start, places=len(lengths))

    def test_every_row_once(self):
        assert sorted(self.order(self.LENGTHS)) == list(range(400))

    def test_by_hand(self):
        lengths = np.array([30, 10, 50, 20, 40])
        order = match_lengths([4, 3, 2, 1, 0], lengths, seed=7, start=2, places=5)
        numbers = np.random.Generator(np.random.PCG64(7)).random(7)[2:]
        ranks = [sum(other < number for other in numbers) for number in numbers]
        assert lengths[order].tolist() == [10 + 10 * rank for rank in ranks]

    def test_rows_of_one_length_keep_the_order_they_came_in(self):
        shuffled = [3, 0, 2, 1]
        numbers = np.random.Generator(np.random.PCG64(0)).random(4)
        places = np.argsort(numbers)
        order = match_lengths(shuffled, np.array([9, 9, 9, 9]), seed=0, start=0, places=4)
        assert [order[place] for place in places] == shuffled

    def test_clients_have_rows_of_like_length_at_the_same_place(self):
        clients = [self.LENGTHS[i::4] for i in range(4)]
        matched = np.stack([rows[self.order(rows, shuffle_seed=i)] for i, rows in enumerate(clients)])
        apart = np.stack([np.random.default_rng(i).permutation(rows) for i, rows in enumerate(clients)])
        alone = matched.sum()
        assert 4 * apart.max(0).sum() / alone > 1.3
        assert 4 * matched.max(0).sum() / alone < 1.1

    def test_later_passes_of_one_client_match_first_passes_of_another(self):
        """A client of 100 rows begins its second pass where one of 200 is half way through its first."""
        short, long = self.LENGTHS[:100], self.LENGTHS[100:300]
        passes = [short[self.order(short, start=start)] for start in (0, 100)]
        correlation = np.corrcoef(np.concatenate(passes), long[self.order(long)])[0, 1]
        assert correlation > 0.9

    def test_a_pass_does_not_depend_on_the_rows_that_the_last_one_dropped(self):
        """Of 7 rows 4 are trained in each pass; 3 / 7 of those dropped from the first are dropped from the second."""
        again = 0
        for seed in range(2000):
            first, second = (
                match_lengths(list(range(7)), np.arange(7), seed=seed, start=start, places=4) for start in (0, 4)
            )
            again += len(set(first[4:]) & set(second[4:]))
        assert again / 6000 == pytest.approx(3 / 7, abs=0.025)

    def test_a_client_alone_sees_its_rows_in_uniformly_random_order(self):
        """Chi-squared over the 24 orders of 4 rows: beyond 49.7 with a probability of 0.001."""
        orders = Counter(tuple(self.order([5, 1, 9, 5], seed, shuffle_seed=-seed % 2**32)) for seed in range(4800))
        assert len(orders) == 24
        assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7

    def test_the_seed_decides(self):
        assert self.order(self.LENGTHS) == self.order(self.LENGTHS)
        assert self.order(self.LENGTHS) != self.order(self.LENGTHS, seed=1)
