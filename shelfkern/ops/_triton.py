"""Whether Triton kernels can run here."""

why_not: str | None = "the Triton kernels are not there yet"
INTERPRETED = False
