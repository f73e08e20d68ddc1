"""What every command that writes a folder shares: the life of a run.

A request is written down first (`folder`), heads are measured one by one (`jobs`), each part is one file, and the
report comes last. The modules here know neither what is measured nor how it is summed up.
"""
