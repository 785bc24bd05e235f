import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from earlybird.arithmetic.packed import decode, encode, pack, read_packed, unpack, write_packed
from earlybird.arithmetic.shift import ShiftConv2d, ShiftLinear, nearest_power_of_two, signed_power_of_two
from earlybird.errors import InputError
from earlybird.files import read_tensors


@given(st.integers(2, 7), st.data())
def test_codes_are_packed_and_read_back_exactly(bits, data):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-bits * codes.numel() // 8)
    assert torch.equal(unpack(packed, codes.numel(), bits), codes)


@given(st.integers(2, 7), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_weight_of_a_layer_has_a_code(bits, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    if zeros:
        shift = torch.empty(50).uniform_(-70, 3, generator=generator)
        weight = signed_power_of_two(shift, torch.empty(50).uniform_(-1, 1, generator=generator), bits=bits)
    else:
        real = torch.randn(50, generator=generator) * torch.rand(50, generator=generator).pow(20).clamp_min(1e-30)
        weight = nearest_power_of_two(real, bits=bits)
    codes = encode(weight, bits, zeros=zeros)
    assert int(codes.max()) < 2**bits
    assert torch.equal(decode(codes, bits, zeros=zeros), weight)


def test_the_code_is_the_one_that_is_described():
    weight = torch.tensor([1.0, 0.5, -1.0, -(2.0**-14), 0.0])
    assert encode(weight).tolist() == [0, 1, 16, 30, 15]
    assert encode(torch.tensor([2.0**-15, -(2.0**-15)]), zeros=False).tolist() == [15, 31]
    # 00001 and 00010 and 10000, the lowest bit first
    assert pack(torch.tensor([1, 2, 16])).tolist() == [0b01000001, 0b01000000]


@pytest.mark.parametrize(
    ("value", "zeros"),
    [(0.3, True), (2.0, True), (2.0**-15, True), (-(2.0**-15), True), (0.0, False), (2.0**-16, False)],
)
def test_a_weight_without_a_code_is_refused(value, zeros):
    with pytest.raises(InputError, match="1 weights, such as"):
        encode(torch.tensor([1.0, value]), zeros=zeros)
    with pytest.raises(InputError):
        encode(torch.tensor([torch.nan]), zeros=zeros)


def test_too_few_bytes_are_refused():
    with pytest.raises(InputError, match="2 bytes, for 3 codes"):
        unpack(torch.zeros(1, dtype=torch.uint8), 3)


def model(form="q", seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        ShiftConv2d(3, 5, 3, form=form, padding=1), nn.BatchNorm2d(5), nn.Flatten(), ShiftLinear(80, 4, form=form)
    )


@pytest.mark.parametrize("form", ["q", "ps", "frozen"])
def test_a_model_is_the_same_after_a_file(form, tmp_path):
    one, other, x = model(form), model(form, seed=1), torch.randn(2, 3, 4, 4)
    one(x)  # running statistics
    path = write_packed(one, tmp_path / "model.safetensors")
    read_packed(other, path)
    assert torch.equal(one.eval()(x), other.eval()(x))
    assert torch.equal(one[0].weight, other[0].weight)
    tensors, metadata = read_tensors(path)
    assert tensors["0.weight"].numel() == -(-5 * 135 // 8)
    assert json.loads(metadata["shifts"])["3"] == {"shape": [4, 80], "bits": 5, "zeros": form != "q"}
    assert not {"0.shift", "0.sign", "0.real"} & set(tensors)


def test_a_silenced_channel_of_rounded_weights_has_no_code(tmp_path):
    one = model("q")
    with torch.no_grad():
        one[0].real[2] = 0
    with pytest.raises(InputError, match=r"layer '0': 27 weights, such as 0"):
        write_packed(one, tmp_path / "model.safetensors")


def test_other_files_and_models_are_refused(tmp_path):
    path = write_packed(model(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="shift layer '0' is"):
        read_packed(model("ps"), path)
    with pytest.raises(InputError, match="no shift layer"):
        read_packed(nn.Sequential(nn.Conv2d(3, 5, 3)), path)
    other = model()
    other[1] = nn.Identity()
    with pytest.raises(InputError, match="does not fit Sequential"):
        read_packed(other, path)
    with pytest.raises(InputError, match="no file"):
        read_packed(model(), tmp_path / "nothing")
