"""The results page and its plots, made from the JSON files in ``integration/results``.

    python -m integration.report [--results FOLDER] [--out FOLDER] [--check]

Nothing in the page is written by hand: a figure that is not in a file is not in the page.
"""
