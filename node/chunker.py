"""Pictures of one stream, a chunk at a time."""

from dataclasses import dataclass
from dataclasses import field as default

from .chunk import Chunk, Picture


@dataclass(slots=True)
class FrameChunker:
    """Collects `chunk_frames` pictures of one size; 1 is image mode, a chunk for each picture.

    What is left over when the size changes or the stream ends becomes a smaller chunk; an odd number of pictures is
    padded with a copy of the last, because the vision tower reads them in pairs.
    """

    chunk_frames: int
    _pictures: list[Picture] = default(default_factory=list)
    _decode_ms: float = 0.0

    def __len__(self) -> int:
        """Pictures that wait for their chunk to be complete."""
        return len(self._pictures)

    def add(self, picture: Picture, decode_ms: float = 0.0) -> list[Chunk]:
        """Take a picture; return what is complete now: the rest of another size, a full chunk, or both."""
        has_new_size = bool(self._pictures) and picture.size != self._pictures[0].size
        chunks = self.flush() if has_new_size else []
        self._pictures.append(picture)
        self._decode_ms += decode_ms
        if len(self._pictures) == self.chunk_frames:
            chunks += self.flush()
        return chunks

    def flush(self) -> list[Chunk]:
        """Make a chunk, padded if need be, of what is left; none if nothing is."""
        if not self._pictures:
            return []
        num_padded = len(self._pictures) % 2 if self.chunk_frames > 1 else 0
        pictures = (*self._pictures, *self._pictures[-1:] * num_padded)
        chunk = Chunk(pictures, num_padded, self._decode_ms)
        self.clear()
        return [chunk]

    def clear(self) -> list[Picture]:
        """Forget what waits, and return it."""
        pictures = self._pictures
        self._pictures, self._decode_ms = [], 0.0
        return pictures
