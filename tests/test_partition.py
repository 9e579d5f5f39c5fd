"""Rows to clients: nothing lost, nothing doubled, and the same mixture to train and to evaluate on."""

from collections import Counter

import pytest
from datasets import Dataset

from hf_fedsa import describe_partition, partition_by_column, partition_dirichlet, partition_iid
from hf_fedsa.partition import join_clients, rows_by_client

LABELS = ["art", "law", "sport", "war"]


def make_labelled(num_rows: int, start: int = 0, labels=LABELS) -> Dataset:
    return Dataset.from_dict(
        {
            "row": list(range(start, start + num_rows)),
            "label": [labels[(i + i // 10) % 7 % len(labels)] for i in range(num_rows)],
            "owner": [f"site_{i * 5 % 11 % 3}" for i in range(num_rows)],
        }
    )


def rows_of(clients) -> dict[str, list[int]]:
    return {client_id: rows["row"][:] for client_id, rows in clients.items()}


def label_counts(clients) -> dict[str, dict[str, int]]:
    """Rows of each label per client."""
    labels = sorted({label for rows in clients.values() for label in rows["label"]})
    counts = {client_id: Counter(rows["label"]) for client_id, rows in clients.items()}
    return {label: {client_id: counts[client_id][label] for client_id in clients} for label in labels}


PARTITIONERS = {
    "iid": lambda rows, **kwargs: partition_iid(rows, 7, **kwargs),
    "dirichlet-0.1": lambda rows, **kwargs: partition_dirichlet(rows, 7, alpha=0.1, label_column="label", **kwargs),
    "dirichlet-100": lambda rows, **kwargs: partition_dirichlet(rows, 7, alpha=100, label_column="label", **kwargs),
    "by_column": lambda rows, **kwargs: partition_by_column(rows, "owner", **kwargs),
}
all_partitioners = pytest.mark.parametrize("partition", PARTITIONERS.values(), ids=PARTITIONERS)
SEEDED = {name: partition for name, partition in PARTITIONERS.items() if name != "by_column"}
seeded_partitioners = pytest.mark.parametrize("partition", SEEDED.values(), ids=SEEDED)


class TestAllPartitioners:
    @all_partitioners
    def test_each_row_goes_to_exactly_one_client(self, partition):
        clients = partition(make_labelled(203))
        assert sorted(row for rows in rows_of(clients).values() for row in rows) == list(range(203))

    @all_partitioners
    def test_each_evaluation_row_goes_to_exactly_one_client(self, partition):
        train, evaluation = partition(make_labelled(203), eval_dataset=make_labelled(61, start=1000))
        assert sorted(row for rows in rows_of(train).values() for row in rows) == list(range(203))
        assert sorted(row for rows in rows_of(evaluation).values() for row in rows) == list(range(1000, 1061))
        assert train.keys() == evaluation.keys()

    @all_partitioners
    def test_rows_come_whole_and_in_their_order(self, partition):
        source = make_labelled(203)
        for rows in partition(source).values():
            assert rows["row"][:] == sorted(rows["row"])
            assert [source[row] for row in rows["row"]] == list(rows)

    @all_partitioners
    def test_it_is_repeatable(self, partition):
        rows, evaluation = make_labelled(203), make_labelled(61, start=1000)
        first, second = (partition(rows, eval_dataset=evaluation) for _ in range(2))
        assert [rows_of(part) for part in first] == [rows_of(part) for part in second]

    @seeded_partitioners
    def test_the_seed_decides(self, partition):
        rows = make_labelled(203)
        assert rows_of(partition(rows, seed=1)) == rows_of(partition(rows, seed=1))
        assert rows_of(partition(rows, seed=1)) != rows_of(partition(rows, seed=2))
        assert rows_of(partition(rows)) == rows_of(partition(rows, seed=42))

    @seeded_partitioners
    def test_evaluation_rows_do_not_change_the_training_rows(self, partition):
        rows = make_labelled(203)
        assert rows_of(partition(rows)) == rows_of(partition(rows, eval_dataset=make_labelled(61, start=1000))[0])

    @seeded_partitioners
    def test_clients_are_numbered(self, partition):
        assert list(partition(make_labelled(203))) == [f"client_{i}" for i in range(7)]


class TestIid:
    @pytest.mark.parametrize("num_rows, num_clients", [(10, 1), (10, 3), (100, 7), (7, 7)])
    def test_clients_are_equal_to_one_row(self, num_rows, num_clients):
        sizes = [len(rows) for rows in partition_iid(make_labelled(num_rows), num_clients).values()]
        assert len(sizes) == num_clients
        assert set(sizes) <= {num_rows // num_clients, -(-num_rows // num_clients)}

    def test_rows_are_shuffled(self):
        rows = rows_of(partition_iid(make_labelled(100), 2))["client_0"]
        assert rows != list(range(50))
        assert 10 < sum(row < 50 for row in rows) < 40

    def test_labels_are_spread_evenly(self):
        for counts in label_counts(partition_iid(make_labelled(4000), 4)).values():
            shares = [count / sum(counts.values()) for count in counts.values()]
            assert all(0.2 < share < 0.3 for share in shares)


class TestDirichlet:
    def partition(self, num_rows=1000, num_clients=5, alpha=0.5, **kwargs):
        rows = kwargs.pop("rows", None) or make_labelled(num_rows)
        return partition_dirichlet(rows, num_clients, alpha, "label", **kwargs)

    def largest_shares(self, clients) -> list[float]:
        return [max(counts.values()) / sum(counts.values()) for counts in label_counts(clients).values()]

    @pytest.mark.parametrize("seed", range(5))
    def test_a_small_alpha_gives_a_label_to_few_clients(self, seed):
        shares = self.largest_shares(self.partition(alpha=0.05, seed=seed))
        assert sum(shares) / len(shares) > 0.6

    @pytest.mark.parametrize("seed", range(5))
    def test_a_large_alpha_is_near_uniform(self, seed):
        assert all(0.2 <= share < 0.25 for share in self.largest_shares(self.partition(alpha=1000, seed=seed)))

    def test_the_seed_decides_the_proportions(self):
        sizes = {tuple(map(len, self.partition(seed=seed).values())) for seed in range(5)}
        assert len(sizes) == 5

    @pytest.mark.parametrize("alpha", [0.1, 1.0, 100])
    def test_a_client_has_the_same_share_of_each_label_in_both_splits(self, alpha):
        train, evaluation = self.partition(alpha=alpha, eval_dataset=make_labelled(397, start=10_000))
        train_counts, eval_counts = label_counts(train), label_counts(evaluation)
        assert train_counts.keys() == eval_counts.keys() == set(LABELS)
        for label in LABELS:
            in_train, in_eval = sum(train_counts[label].values()), sum(eval_counts[label].values())
            for client_id in train:
                difference = train_counts[label][client_id] / in_train - eval_counts[label][client_id] / in_eval
                # Each side is off the drawn proportion by less than one row.
                assert abs(difference) < 1 / in_train + 1 / in_eval

    def test_a_label_that_training_lacks_is_spread_like_all_rows(self):
        unseen = make_labelled(500, start=10_000, labels=["new"])
        train, evaluation = self.partition(alpha=0.3, eval_dataset=unseen)
        assert sum(map(len, evaluation.values())) == 500
        assert len({len(rows) for rows in train.values()}) > 1
        for client_id in train:
            assert abs(len(evaluation[client_id]) - 500 * len(train[client_id]) / 1000) < 1

    def test_every_client_gets_its_minimum(self):
        def smallest(**kwargs):
            return [
                min(len(rows) for rows in self.partition(num_rows=400, alpha=0.3, seed=seed, **kwargs).values())
                for seed in range(10)
            ]

        assert min(smallest(min_examples=30)) >= 30
        assert 1 <= min(smallest()) < 30

    def test_a_minimum_out_of_reach_is_an_error(self):
        with pytest.raises(ValueError, match="No split of 100 rows over `num_clients=10` with `alpha=0.01`.*Raise"):
            self.partition(num_rows=100, num_clients=10, alpha=0.01, min_examples=10)

    @pytest.mark.parametrize("min_examples", [0, -1, 21])
    def test_a_minimum_that_cannot_be_is_an_error(self, min_examples):
        with pytest.raises(ValueError, match=f"`min_examples={min_examples}` for `num_clients=5` needs between 5 and"):
            self.partition(num_rows=100, min_examples=min_examples)

    @pytest.mark.parametrize("alpha", [0, -0.5, float("nan"), float("inf")])
    def test_alpha_must_be_positive_and_finite(self, alpha):
        with pytest.raises(ValueError, match=f"`alpha` must be a positive number, got {alpha}"):
            self.partition(alpha=alpha)

    @pytest.mark.parametrize("labels", [[0, 1, 2, 3], [True, False], [0.5, 1.5]], ids=["int", "bool", "float"])
    def test_labels_need_not_be_text(self, labels):
        clients = self.partition(rows=make_labelled(200, labels=labels))
        assert sorted(row for rows in rows_of(clients).values() for row in rows) == list(range(200))


class TestByColumn:
    def test_clients_are_the_values_of_the_column(self):
        clients = partition_by_column(make_labelled(50), "owner")
        assert list(clients) == ["site_0", "site_1", "site_2"]
        assert all(set(rows["owner"]) == {client_id} for client_id, rows in clients.items())

    def test_numbers_become_text(self):
        clients = partition_by_column(Dataset.from_dict({"row": [0, 1, 2], "owner": [7, 30, 7]}), "owner")
        assert rows_of(clients) == {"30": [1], "7": [0, 2]}

    def test_evaluation_rows_may_name_other_clients(self):
        rows = Dataset.from_dict({"row": [0, 1], "owner": ["a", "b"]})
        other = Dataset.from_dict({"row": [5, 6], "owner": ["c", "a"]})
        train, evaluation = partition_by_column(rows, "owner", eval_dataset=other)
        assert rows_of(train) == {"a": [0], "b": [1]}
        assert rows_of(evaluation) == {"a": [6], "c": [5]}


class TestErrors:
    @pytest.mark.parametrize("num_clients", [0, -1, 11])
    @pytest.mark.parametrize(
        "partition",
        [partition_iid, lambda rows, n: partition_dirichlet(rows, n, alpha=1.0, label_column="label")],
        ids=["iid", "dirichlet"],
    )
    def test_there_must_be_a_row_for_every_client(self, partition, num_clients):
        with pytest.raises(ValueError, match=f"`num_clients={num_clients}` must be between 1 and the 10 rows"):
            partition(make_labelled(10), num_clients)

    @pytest.mark.parametrize("rows", [{"row": [1]}, [{"row": 1}], None], ids=["dict", "list", "None"])
    @pytest.mark.parametrize(
        "partition",
        [lambda rows: partition_iid(rows, 1), lambda rows: partition_dirichlet(rows, 1, 1.0, "label")],
        ids=["iid", "dirichlet"],
    )
    def test_rows_must_be_a_dataset(self, partition, rows):
        with pytest.raises(TypeError, match=f"must be a `datasets.Dataset`, got `{type(rows).__name__}`"):
            partition(rows)

    BY_LABEL = {
        "dirichlet": lambda rows, **kwargs: partition_dirichlet(rows, 2, 1.0, "label", **kwargs),
        "by_column": lambda rows, **kwargs: partition_by_column(rows, "label", **kwargs),
    }

    @pytest.mark.parametrize("partition", BY_LABEL.values(), ids=BY_LABEL)
    def test_a_missing_column_is_named(self, partition):
        without = make_labelled(10).remove_columns("label")
        with pytest.raises(ValueError, match="`dataset` has no column `label`, only: row, owner"):
            partition(without)
        with pytest.raises(ValueError, match="`eval_dataset` has no column `label`, only: row, owner"):
            partition(make_labelled(10), eval_dataset=without)

    @pytest.mark.parametrize("partition", BY_LABEL.values(), ids=BY_LABEL)
    def test_a_null_is_found(self, partition):
        with_null = Dataset.from_dict({"label": ["a", "b", None, "a"]})
        with pytest.raises(ValueError, match="Column `label` of `dataset` is null in row 2"):
            partition(with_null)
        with pytest.raises(ValueError, match="Column `label` of `eval_dataset` is null in row 2"):
            partition(make_labelled(10), eval_dataset=with_null)


class TestDescribe:
    CLIENTS = {
        "client_0": Dataset.from_dict({"topic": ["art"] * 10 + ["law"] * 2}),
        "client_1": Dataset.from_dict({"topic": ["law"] * 7 + ["art"]}),
    }

    def test_with_labels(self):
        assert describe_partition(self.CLIENTS, label_column="topic") == (
            "client    rows  art  law\n"  #
            "client_0    12   10    2\n"
            "client_1     8    1    7"
        )

    def test_without_labels(self):
        assert describe_partition(self.CLIENTS) == "client    rows\nclient_0    12\nclient_1     8"

    def test_a_label_that_a_client_lacks_is_zero(self):
        clients = {"a": Dataset.from_dict({"label": [2, 2]}), "b": Dataset.from_dict({"label": [1]})}
        assert describe_partition(clients, "label") == "client  rows  1  2\na          2  0  2\nb          1  1  0"

    def test_a_missing_column_names_the_client(self):
        with pytest.raises(ValueError, match="`client_0` has no column `label`, only: topic"):
            describe_partition(self.CLIENTS, label_column="label")


class TestMergeClients:
    def test_rows_carry_their_client(self):
        merged = join_clients(
            {"b": Dataset.from_dict({"x": [1, 2]}), "a": Dataset.from_dict({"x": [3]})}, column="client_id"
        )
        assert merged.to_dict() == {"x": [1, 2, 3], "client_id": ["b", "b", "a"]}

    def test_it_undoes_a_partition(self):
        source = make_labelled(40)
        clients = partition_dirichlet(source, 3, 0.5, "label")
        merged = join_clients(clients, column="client_id")
        found = rows_by_client(merged, "client_id", name="merged")
        assert {client_id: [merged[i]["row"] for i in rows] for client_id, rows in found.items()} == rows_of(clients)

    def test_a_column_that_says_the_same_is_fine(self):
        clients = partition_by_column(make_labelled(10), "owner")
        merged = join_clients(clients, column="owner")
        assert merged["owner"][:] == [client_id for client_id, rows in clients.items() for _ in rows]

    def test_the_order_of_columns_may_differ(self):
        clients = {
            "a": Dataset.from_dict({"x": [1], "y": ["p"]}),
            "b": Dataset.from_dict({"y": ["q"], "x": [2]}),
        }
        merged = join_clients(clients, column="client_id")
        assert (merged["x"][:], merged["y"][:]) == ([1, 2], ["p", "q"])

    def test_the_clients_own_datasets_are_not_changed(self):
        rows = Dataset.from_dict({"x": [1]})
        join_clients({"a": rows}, column="client_id")
        assert rows.column_names == ["x"]

    def test_a_column_that_says_something_else_is_refused(self):
        clients = {"a": Dataset.from_dict({"x": [1, 2], "owner": ["a", "b"]})}
        with pytest.raises(ValueError, match="client 'a' have a column `owner` with other values"):
            join_clients(clients, column="owner")

    def test_a_client_without_rows_is_refused(self):
        rows = Dataset.from_dict({"x": [1]})
        with pytest.raises(ValueError, match="Client 'b' has no rows"):
            join_clients({"a": rows, "b": rows.select([])}, column="client_id")

    def test_other_columns_are_named(self):
        clients = {"a": Dataset.from_dict({"x": [1], "y": [1]}), "b": Dataset.from_dict({"x": [1], "z": [1]})}
        with pytest.raises(ValueError, match="Clients 'a' and 'b' differ in the columns y, z"):
            join_clients(clients, column="client_id")

    @pytest.mark.parametrize("kind", ["list", "streamed"])
    def test_rows_must_be_a_dataset(self, kind):
        rows = [{"x": 1}] if kind == "list" else Dataset.from_dict({"x": [1]}).to_iterable_dataset()
        with pytest.raises(TypeError, match=f"client 'a' must be a `datasets.Dataset`, got `{type(rows).__name__}`"):
            join_clients({"a": rows}, column="client_id")


class TestRowsByClient:
    def test_clients_are_sorted_and_rows_in_order(self):
        rows = Dataset.from_dict({"owner": ["b", "a", "b", "c", "a"]})
        found = rows_by_client(rows, "owner", name="rows")
        assert list(found.items()) == [("a", [1, 4]), ("b", [0, 2]), ("c", [3])]

    def test_a_selection_counts_its_own_rows(self):
        rows = Dataset.from_dict({"owner": ["b", "a", "b", "c"]}).select([3, 2, 1])
        assert rows_by_client(rows, "owner", name="rows") == {"a": [2], "b": [1], "c": [0]}

    def test_a_missing_column_is_named(self):
        with pytest.raises(ValueError, match="`train_dataset` has no column `owner`, only: x"):
            rows_by_client(Dataset.from_dict({"x": [1]}), "owner", name="train_dataset")

    def test_a_null_is_found(self):
        with pytest.raises(ValueError, match="Column `owner` of `train_dataset` is null in row 1"):
            rows_by_client(Dataset.from_dict({"owner": ["a", None]}), "owner", name="train_dataset")
