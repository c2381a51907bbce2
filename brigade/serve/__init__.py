"""What do people see? The OpenAI-compatible HTTP API, metrics and readiness. Must not import torch."""
