"""Quantities as people read them."""


def bytes_text(num_bytes: int) -> str:
    """`1.84 GB`, in powers of 1000; below a kilobyte to the byte."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} TB"
