import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardemb.checkpoint import safetensors_io
from shardemb.utils.files import sha256_of

TENSORS = {
    "half": torch.randn(7, 3).half(),
    "brain": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "wide": torch.randn(501, 6),
    "strided": torch.randn(9, 8)[:, :5],
    "complex": torch.randn(4, dtype=torch.complex64),
    "bool": torch.tensor([True, False]),
}


def test_its_own_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        size, digest = safetensors_io.write(file, TENSORS)
    assert size == path.stat().st_size
    with path.open("rb") as file:
        assert digest == sha256_of(file) == sha256_of(path)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, TENSORS[name]), name
        assert tensor.dtype == TENSORS[name].dtype


def test_we_read_what_its_own_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    with path.open("rb") as file:
        layouts = safetensors_io.layouts(file)
        assert layouts.keys() == TENSORS.keys()
        for name, layout in layouts.items():
            out = torch.empty(layout.shape, dtype=layout.dtype)
            safetensors_io.read_rows(file, layout, 0, out)
            assert torch.equal(out, TENSORS[name]), name
        part = torch.empty(10, 8, dtype=torch.float64)[:, :6]  # neither the dtype nor contiguous
        safetensors_io.read_rows(file, layouts["wide"], 100, part)
        assert torch.equal(part, TENSORS["wide"][100:110].double())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "header of 0 bytes"),
        (b"\xff" * 20, "header of"),
        (b"\x02\0\0\0\0\0\0\0[]", "not one of safetensors"),
        (safetensors_io.header({"a": (torch.float32, (2, 3))}), "tensor 'a' does not lie within"),
        (
            safetensors_io.header({"a": (torch.float32, (2, 3))}).replace(b"F32", b"F99"),
            "not one of safetensors",
        ),
    ],
)
def test_a_file_of_another_kind(content: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        safetensors_io.layouts(io.BytesIO(content))


def test_a_short_file_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(EOFError, match="got 4 bytes from 2 on, expected 8"):
        safetensors_io.read_into(io.BytesIO(b"abcdef"), 2, torch.empty(2))
