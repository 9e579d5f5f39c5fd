"""What travels between server and clients: there and back bit for bit, and nothing else taken for a message."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load, save

from hf_fedsa.messages import Broadcast, ClientInfo, MessageError, Update, from_bytes, to_bytes
from hf_fedsa.tensors import flatten, layout_sha256, tensors_sha256, unflatten

TENSORS = {
    "a.lora_A.weight": torch.tensor([[1.0, -0.0], [1e-45, 3e38]]),
    "b.lora_A.weight": torch.tensor([1.0 + 2**-7, 5.0], dtype=torch.bfloat16),
    "c.lora_A.weight": torch.tensor([[0.1]], dtype=torch.float16),
}
BROADCAST = Broadcast(
    round_index=3,
    shared=TENSORS,
    trained=("B",),
    last_counted={"client_0": 2, "client_1": None},
    schedule_start=9,
    schedule_steps=12,
    run_id="run",
)
UPDATE = Update("client_0", 3, TENSORS, weight=7.5, num_steps=2, metrics={"loss": 0.1})
FAULT = Update("client_0", 3, {}, weight=0.0, num_steps=0, fault="its rows cannot be read: ä")
INFO = ClientInfo("client_0", 8, 3, worker="hospital", fingerprint={"layout": "f00", "shapes": [[1, 2]], "r": None})


def same(first, second):
    """Equality of messages to the last bit, NaN included."""
    assert type(first) is type(second)
    for field in dataclasses.fields(first):
        ours, theirs = getattr(first, field.name), getattr(second, field.name)
        if field.name == "shared":
            assert tensors_sha256(ours) == tensors_sha256(theirs)
        else:
            assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
            assert type(ours) is type(theirs)
    return True


@pytest.mark.parametrize(
    "message",
    [BROADCAST, UPDATE, FAULT, INFO, Broadcast(0, {}), Update("a", 0, {}, 1.0, 1), ClientInfo("a", 1, 1)],
    ids=["broadcast", "update", "fault", "info", "empty broadcast", "empty update", "bare info"],
)
def test_there_and_back(message):
    assert same(from_bytes(to_bytes(message)), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 0.1 + 0.2, 5e-324], ids=str)
def test_numbers_keep_their_bits(value):
    tensors = {"a": torch.tensor([value, 1.0]), "b": torch.tensor([value], dtype=torch.bfloat16)}
    message = Update("a", 0, tensors, weight=1.0, num_steps=1, metrics={"loss": value})
    assert same(from_bytes(to_bytes(message)), message)


def test_a_view_of_a_larger_tensor_travels_as_what_it_is():
    tensors = {"a": torch.arange(12.0).view(3, 4).T[1:3], "b": torch.ones(2, requires_grad=True)}
    found = from_bytes(to_bytes(Update("a", 0, tensors, 1.0, 1))).shared
    assert found["a"].tolist() == [[1.0, 5.0, 9.0], [2.0, 6.0, 10.0]]
    assert not found["b"].requires_grad


def test_nothing_is_pickled():
    data = to_bytes(UPDATE)
    assert data[8:9] == b"{"
    assert tensors_sha256(load(data)) == tensors_sha256(TENSORS)


class TestDamage:
    @pytest.mark.parametrize("message", [BROADCAST, FAULT, INFO], ids=["broadcast", "fault", "info"])
    def test_every_cut_is_seen(self, message):
        data = to_bytes(message)
        for length in range(len(data)):
            with pytest.raises(MessageError, match=f"^{length} bytes that are no whole message"):
                from_bytes(data[:length])

    @pytest.mark.parametrize("message", [BROADCAST, FAULT, INFO], ids=["broadcast", "fault", "info"])
    def test_every_flipped_bit_is_seen_or_changes_nothing(self, message):
        data = to_bytes(message)
        seen = 0
        for position in range(len(data)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            try:
                found = from_bytes(bytes(damaged))
            except MessageError:
                seen += 1
            else:  # White space of the header.
                assert same(found, message)
        assert seen > 0.9 * len(data)

    def test_a_changed_tensor_is_named_as_such(self):
        data = bytearray(to_bytes(UPDATE))
        data[-1] ^= 1
        with pytest.raises(MessageError, match="A `Update` of .* bytes was changed on its way. Send it again"):
            from_bytes(bytes(data))

    @pytest.mark.parametrize("data", [b"", b"hello", bytes(8), b"\x80\x04K\x01.", b"\xff" * 64], ids=repr)
    def test_other_bytes(self, data):
        with pytest.raises(MessageError, match="are no whole message"):
            from_bytes(data)

    def test_something_after_the_end(self):
        with pytest.raises(MessageError):
            from_bytes(to_bytes(UPDATE) + b"\0")


def forge(kind="Update", tensors=None, text=None, **changes):
    """Bytes as another version, or somebody else, might make them: whole, with the right hash."""
    tensors = tensors or {}
    values = {"client_id": "a", "round_index": 0, "weight": 1.0, "num_steps": 1, "metrics": {}, "fault": None}
    values = {name: value for name, value in {**values, **changes}.items() if value is not ...}
    text = json.dumps(values) if text is None else text
    digest = hashlib.sha256((text + tensors_sha256(tensors)).encode()).hexdigest()
    return save(tensors, metadata={"kind": kind, "values": text, "sha256": digest})


class TestForged:
    def test_the_forger_works(self):
        assert same(from_bytes(forge(weight=2.0)), Update("a", 0, {}, 2.0, 1))

    @pytest.mark.parametrize("kind", ["update", "dict", "", "MessageError"])
    def test_an_unknown_kind(self, kind):
        with pytest.raises(MessageError, match="no whole message"):
            from_bytes(forge(kind=kind))

    def test_a_file_of_tensors_without_a_message(self):
        with pytest.raises(MessageError, match="no whole message"):
            from_bytes(save(TENSORS))

    @pytest.mark.parametrize(
        ("changes", "name"), [({"weight": ...}, "weight"), ({"rows": [1]}, "rows"), ({"shared": {}, "x": 1}, "x")]
    )
    def test_other_fields(self, changes, name):
        with pytest.raises(MessageError, match=f"differs in the field '{name}'. Both sides need one version"):
            from_bytes(forge(**changes))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("client_id", 1),
            ("client_id", None),
            ("round_index", 1.0),
            ("round_index", True),
            ("round_index", "1"),
            ("weight", "1"),
            ("weight", None),
            ("weight", True),
            ("num_steps", 1.5),
            ("metrics", [1.0]),
            ("metrics", {"loss": "low"}),
            ("metrics", {"loss": None}),
            ("fault", 3),
        ],
    )
    def test_a_field_of_another_type(self, name, value):
        with pytest.raises(MessageError, match=f"The field `{name}` of a `Update` is .*, of the wrong type"):
            from_bytes(forge(**{name: value}))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("trained", "AB"),
            ("trained", [1]),
            ("last_counted", {"a": 1.5}),
            ("last_counted", None),
            ("schedule_start", None),
            ("schedule_steps", "9"),
            ("run_id", 1),
        ],
    )
    def test_a_field_of_a_broadcast_of_another_type(self, name, value):
        entries = {field.name: getattr(BROADCAST, field.name) for field in dataclasses.fields(BROADCAST)}
        del entries["shared"]
        with pytest.raises(MessageError, match=f"The field `{name}` of a `Broadcast` is .*, of the wrong type"):
            from_bytes(forge(kind="Broadcast", text=json.dumps({**entries, name: value})))

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "[" * 100_000])
    def test_values_that_are_no_entries(self, text):
        with pytest.raises(MessageError):
            from_bytes(forge(text=text))


class TestFlat:
    SHAPED = {
        "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "a": torch.tensor([0.5], dtype=torch.bfloat16),
        "c": torch.tensor(7.0, dtype=torch.float16),
    }

    def test_by_hand(self):
        flat = flatten(self.SHAPED)
        assert flat.dtype == torch.float32
        assert flat.tolist() == [0.5, 1.0, 2.0, 3.0, 4.0, 7.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_there_and_back_bit_for_bit(self, dtype):
        generator = torch.Generator().manual_seed(0)
        tensors = {key: torch.randn(3, n, generator=generator).to(dtype) for key, n in (("y", 4), ("x", 1), ("z", 0))}
        tensors["y"][0] = torch.tensor([float("inf"), -0.0, 6e-8, float("nan")])
        assert tensors_sha256(unflatten(flatten(tensors), tensors)) == tensors_sha256(tensors)

    def test_nothing_at_all(self):
        assert flatten({}).shape == (0,)
        assert unflatten(torch.empty(0), {}) == {}

    def test_the_parts_are_their_own(self):
        flat = flatten(self.SHAPED)
        unflatten(flat, self.SHAPED)["b"].zero_()
        assert flat.tolist() == [0.5, 1.0, 2.0, 3.0, 4.0, 7.0]
        flatten({"b": self.SHAPED["b"]}).zero_()
        assert self.SHAPED["b"].sum() == 10

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8])
    def test_a_dtype_that_fp32_does_not_hold(self, dtype):
        with pytest.raises(ValueError, match="`x` is torch.* does not hold exactly"):
            flatten({"x": torch.ones(2, dtype=dtype)})

    @pytest.mark.parametrize("flat", [torch.zeros(5), torch.zeros(7), torch.zeros(2, 3), torch.tensor(1.0)])
    def test_an_array_of_another_size(self, flat):
        with pytest.raises(ValueError, match="cannot be divided into the 3 tensors .* which have 6 numbers"):
            unflatten(flat, self.SHAPED)

    def test_the_layout_is_names_and_shapes_alone(self):
        expected = layout_sha256(self.SHAPED)
        assert layout_sha256(dict(reversed(self.SHAPED.items()))) == expected
        assert layout_sha256({key: tensor.float() * 2 for key, tensor in self.SHAPED.items()}) == expected
        others = [
            {**self.SHAPED, "b": torch.zeros(4)},
            {**self.SHAPED, "b": torch.zeros(1, 4)},
            {**self.SHAPED, "d": torch.zeros(0)},
            {"b": self.SHAPED["b"], "a": self.SHAPED["a"]},
            {"b": self.SHAPED["b"], "a": self.SHAPED["a"], "C": self.SHAPED["c"]},
        ]
        assert len({expected, *map(layout_sha256, others)}) == 6


def test_a_client_is_not_told_who_else_takes_part():
    sent = Broadcast(4, {"A": torch.zeros(2)}, last_counted={"ann": 3, "bob": None, "eve": 1}, run_id="r").to("bob")
    assert sent.last_counted == {"bob": None}
    assert b"ann" not in to_bytes(sent) and b"eve" not in to_bytes(sent)
    assert (sent.round_index, sent.run_id) == (4, "r")
