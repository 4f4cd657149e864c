"""A toy experiment: eight prompts, sixteen samples, eight rows."""

TOY = r"""
description: Eight prompts, sixteen samples.
task: {name: pep8, max_prompts: 40}
policy: {model: pep8-sloppy-1m}
iterations: 3
method: {name: alt_lmu, template: "# {condition}\n{prompt}", ask_for: no issues, probe: [syntax error]}
prompts: {per_iteration: 8}
sampling: {samples_per_prompt: 2, max_new_tokens: 16, ignore_eos: true}
datapool: {drop_factor: 0.0, per: pool, samples: 8, shares: {"3": 0.5, "0": 0.5}, fill: shuffled}
evaluation: {prompts: 32, samples_per_prompt: 1, resamples: 100}
checks: {max_shortfall: 1.0, max_duplicates: 1.0, min_diversity: 0.0}
"""
