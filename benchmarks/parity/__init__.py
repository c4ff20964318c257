"""Are converted adapters the ones they were? Logits next to those of the `adapters` package and of PEFT."""
