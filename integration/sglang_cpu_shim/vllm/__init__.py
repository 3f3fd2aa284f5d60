"""Not vLLM: the one function of it that SGLang needs on a CPU. See ../README.md."""
