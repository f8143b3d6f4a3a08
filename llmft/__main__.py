"""`python -m llmft` is `python -m llmft.train`."""

from llmft.train import main

if __name__ == "__main__":
    main()
