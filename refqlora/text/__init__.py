"""Text in and out: tokenizers, examples into batches, chat templates, sampling and generation."""
