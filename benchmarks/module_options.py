"""What the options of SetAttention are worth: accuracy on the digits of ``setformer demo``.

    python benchmarks/module_options.py [--seeds 3] [--steps 800] [NAME ...]

prints a line of Markdown per option: the test accuracy of every seed, their mean, and the mean
training loss of the last 50 steps. The seed draws the split, the weights and the order.
"""

import argparse
from functools import partial
from statistics import fmean

from setformer_ext.controls import SoftmaxAttention
from setformer_ext.demo.data import load_digits
from setformer_ext.demo.model import Classifier, make_set_attention
from setformer_ext.demo.train import train

UNIFORM = {"learned_token_mass": False, "learned_reference_mass": False}
ATTENTIONS = {
    "softmax": SoftmaxAttention,
    "SeT, as in the demo": make_set_attention,
    "uniform masses": partial(make_set_attention, **UNIFORM),
    "uniform reference mass": partial(make_set_attention, learned_reference_mass=False),
    "no positions": partial(make_set_attention, position_bandwidth=None),
    "epsilon 0.1": partial(make_set_attention, epsilon=0.1),
    "learned epsilon and bandwidth": partial(
        make_set_attention, learned_epsilon=True, learned_bandwidth=True
    ),
    "1 iteration": partial(make_set_attention, iterations=1),
    "0 iterations": partial(make_set_attention, iterations=0),
    "8 references": partial(make_set_attention, num_references=8),
    "pooled references": partial(make_set_attention, pooled_references=True),
    "separate query": partial(make_set_attention, query_projection=True),
    "linear kernel": partial(make_set_attention, kernel="linear"),
    "Nystrom, 16 anchors": partial(make_set_attention, num_anchors=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ATTENTIONS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    print("| attention | test accuracy per seed | mean | loss |\n| --- | --- | --- | --- |")
    for name in options.names or ATTENTIONS:
        accuracies, losses = [], []
        for seed in range(options.seeds):
            make_model = partial(Classifier, 1, 8, 10, ATTENTIONS[name])
            _, history = train(
                make_model,
                load_digits(8, seed),
                steps=options.steps,
                seed=seed,
                description=f"{name}, seed {seed}",
            )
            accuracies.append(history.accuracy)
            losses.append(fmean(history.losses[-50:]))
        each = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        print(f"| {name} | {each} | {fmean(accuracies):.4f} | {fmean(losses):.4f} |", flush=True)


if __name__ == "__main__":
    main()
