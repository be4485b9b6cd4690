"""The reference's predictions on some tokens, kept in one file: whoever has no checkpoint still judges divergence and perplexity by it."""
