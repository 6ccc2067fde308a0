"""Optimizers of matrices for a Trainer that is given a model's parameters without names."""


def optimizer_of(kind):
    """What `make_trainer` calls with the parameters of the model, of which a tiny Llama's 14
    projections are found by their shapes: no other weight has 2 dimensions but embedding and head.
    """

    def make(parameters, **settings):
        parameters = [*parameters]
        others = [p for p in parameters if p.dim() == 1] + [parameters[0], parameters[-1]]
        ids = {id(p) for p in others}
        matrices = [p for p in parameters if id(p) not in ids]
        return kind([{"params": others}, {"params": matrices, "matrices": True}], **settings)

    return make
