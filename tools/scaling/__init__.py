"""
What low precision costs in loss, as a law that is fitted to finished runs (paper section 4).

README.md explains the law; `python -m tools.scaling --help` lists the commands.
"""
