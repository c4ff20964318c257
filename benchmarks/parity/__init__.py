"""Are converted adapters the ones they were? Logits beside those of the `adapters` package and of PEFT."""
