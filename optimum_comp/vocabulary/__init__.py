"""A smaller vocabulary: which tokens stay, the tokenizer's files, and the rows of embedding and head."""
