"""Text files to batches of shifted windows.

`datamodule.TextData` and `datamodule.BinData` are the LightningDataModules (`TokenData` is what they share);
`tokenizer.Tokenizer` is the interface of the tokenizers, `tokenizer_file.load_tokenizer` reads a saved one;
`windows` makes the pairs (inputs, targets) and their order. `text_files`, `prepare` and `token_files` serve these.
"""
