"""What low precision costs in loss, as a law fitted to finished runs (paper section 4). python -m scaling --help"""
