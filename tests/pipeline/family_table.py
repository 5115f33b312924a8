"""What is known of every family behind transformers' door, beyond that it is exact: test_families.py holds each line to it."""

from __future__ import annotations

NOT_SERVED: dict[str, str] = {
    "diffusion_gemma": "its two stacks share their experts, and it writes blocks by diffusion instead of token by token",
}
"""Family -> why its answers are not transformers'. The tests fail as soon as one of them is served after all."""
NOT_WRITING: dict[str, str] = {
    "openai_privacy_filter": "it labels tokens and has no language head",
}
"""Family -> why it is served but does not write."""
