"""Graphs: files of triples, splits, ingested datasets, triples in memory."""
