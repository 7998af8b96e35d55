"""The method: balanced low-rank adapters, as a PEFT tuner."""
