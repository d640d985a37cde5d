"""Built-in evaluators: what a run measures of itself while it trains.

Each hands a data set to a protocol of ``cosmos_ssl.evaluation.protocols``, as ``cosmos-ssl eval`` does, and draws
pictures of what was found. They import the public packages api, functional, models and evaluation.
"""
