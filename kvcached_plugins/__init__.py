"""Plugins that give stock LLM engines an elastic KV cache: ``.vllm`` and ``.sglang``."""

TOGGLE = "ENABLE_KVCACHED"
"""The environment variable that turns us on."""

OFF = ("", "0", "false", "no", "off")
"""What it may say to leave the engine alone, lower case; so does leaving it unset."""
