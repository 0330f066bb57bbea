import numpy as np
import pytest
import torch
from checkpoints import chunk

from onlooker.node.upload import Uploader, upload

CPU = torch.device("cpu")


def test_frames_become_one_tensor_of_their_bytes():
    frames = [picture.pixels for picture in chunk(0, 4).pictures]
    pixels = upload(frames, CPU)
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, *frames[0].shape)
    assert np.array_equal(pixels.numpy(), np.stack(frames))


def test_an_upload_brings_the_pictures_of_its_chunk():
    uploader, chunks = Uploader(CPU), [chunk(0), chunk(2, 1)]
    uploads = [uploader.start(each) for each in chunks]
    for each, ahead in zip(chunks, uploads, strict=True):
        assert ahead.chunk is each
        assert np.array_equal(ahead.pixels().numpy(), np.stack([picture.pixels for picture in each.pictures]))
    uploader.close()


def test_what_fails_on_the_way_fails_where_the_pictures_are_wanted():
    class NoPictures:
        pictures = ()

    uploader = Uploader(CPU)
    ahead = uploader.start(NoPictures())  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        ahead.pixels()
    assert uploader.start(chunk(0)).pixels().shape[0] == 2
    uploader.close()
