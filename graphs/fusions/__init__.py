"""One fusion a file: ``RULES``, what they look for (``is_candidate``) and the words in which they refuse. graphs/pipeline.py lists them."""
