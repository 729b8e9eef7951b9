"""Damage that no checksum of a zip archive is over: in its list of members."""

import struct

import numpy as np
import pytest
import torch

from emd_retrieval._checksums import AlteredError, check_archive, check_checkpoint
from emd_retrieval.retrieval import CandidateTable

ENTRY = b"PK\x01\x02"


@pytest.fixture
def candidates(tmp_path):
    file = tmp_path / "candidates.npz"
    np.savez_compressed(file, ids=np.arange(8).reshape(2, 4), scores=np.ones((2, 4), np.float32))
    return file


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "checkpoint.ckpt"
    torch.save({"state": torch.arange(4.0), "global_step": 8}, file)
    return file


def alter(file, place, content):
    data = bytearray(file.read_bytes())
    data[place : place + len(content)] = content
    file.write_bytes(data)


def test_whole_archives_pass(candidates, checkpoint):
    check_archive(candidates)
    check_checkpoint(checkpoint)


def test_a_hidden_member_is_missed(candidates):
    """A comment of that length takes in the next entry, and the scores would not be there."""
    data = candidates.read_bytes()
    first = data.index(ENTRY)
    length = len(data) - 22 - data.index(ENTRY, first + 4)
    alter(candidates, first + 32, struct.pack("<H", length))
    with np.load(candidates) as archive:
        assert archive.files == ["ids"], "the attack is real"
    with pytest.raises(AlteredError, match=r"candidates\.npz was altered: it lists 1 of its 2 "):
        check_archive(candidates)
    with pytest.raises(ValueError, match=r"candidates\.npz was altered|candidates\.npz is not"):
        CandidateTable.read(candidates)


def test_what_only_torch_objects_to_is_told_with_the_name(checkpoint):
    """Where the next entry begins is told by lengths that zipfile adds up in another way."""
    data = checkpoint.read_bytes()
    found = []
    for place in range(data.index(ENTRY), len(data)):
        alter(checkpoint, place, bytes([data[place] ^ 1 << place % 8]))
        try:
            check_checkpoint(checkpoint)
            torch.load(checkpoint, weights_only=True)
        except ValueError as error:
            found.append(str(error))
        checkpoint.write_bytes(data)
    assert all("checkpoint.ckpt" in message for message in found)
    assert any("is damaged" in message for message in found)
