"""The one life of a run that can be interrupted, shared by every command that writes a folder.

request -> plan (`request`, `life.Plan`) -> units (`units`), whose tensors come from a source (`sources`) and which an
executor measures (`executors`) -> parts, each written once under a checksum (`life`, `folder`) -> the report, last.
"""
