"""
A trained model continues a text: --sample of quartet.py, and the sample at the end of a run.
"""
import torch

from data.files import checked
from data.tokenizer import vocabulary_from_state
from model import PRESETS
from tools import checkpoint, machine, schedule


def from_checkpoint(cfg, settings_of, build_model):
    """The text --sample, continued by the checkpoint of the run that cfg names.

    settings_of and build_model are the trainer's, which nothing in tools/ may import.
    """
    state = checkpoint.load(cfg.folder)
    trained = schedule.settings_at(settings_of(state, cfg), PRESETS, len(state["history"]))
    vocabulary = vocabulary_from_state(state["corpus"]["vocabulary"])
    with machine.errors_in_words(trained):
        model = build_model(trained, vocabulary.size)
        checkpoint.restore_model(state, model)
        return sample(model, vocabulary, cfg.sample, cfg)


def sample(model, vocabulary, text, cfg):
    """The text, continued by the model. Raises UserError if it cannot be."""
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    ids = torch.tensor([vocabulary.encode(text)], device=cfg.device)
    ids = checked(generate, model, ids, cfg.sample_tokens, generator=generator)
    return vocabulary.decode(ids[0].tolist())


@torch.no_grad()
def generate(model, idx, n_tokens, temperature=0.8, top_k=50, generator=None):
    """idx [1, T] -> [1, T + n_tokens]: one token after the other, drawn from the top_k most
    likely. Nothing is cached, so each token costs a whole forward pass.

    Raises ValueError when the logits are not finite."""
    for _ in range(n_tokens):
        context = idx[:, -model.config.block_size:]
        logits = model(context)[:, -1] / temperature
        values, tokens = logits.topk(min(top_k, logits.shape[-1]))
        if not values.isfinite().all():
            raise ValueError("the logits are not finite")
        choice = torch.multinomial(values.softmax(-1), 1, generator=generator)
        idx = torch.cat((idx, tokens.gather(-1, choice)), dim=1)
    return idx
