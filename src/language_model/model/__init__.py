"""Tokens to logits, and logits to new tokens. Imports nothing of the package.

`gpt.GPT` is the network; any ``nn.Module`` from tokens (B, T) to logits (B, T, V) can take its place. `dropout.Dropout`
is its dropout.
`generate.generate` samples from it; `generate.stream_decode` turns sampled ids into text as they come.
"""
