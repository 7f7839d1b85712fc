"""
A trained model as a folder that Hugging Face's transformers loads.

`python -m tools.huggingface --help` lists the commands; tools/README.md explains the three forms.
"""
