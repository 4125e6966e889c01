"""The commands of ``python -m fastema`` that need more than a few lines, each in its file."""
