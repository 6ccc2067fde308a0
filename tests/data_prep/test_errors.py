import inspect
import pickle

from apex_composer.data_prep import errors
from apex_composer.data_prep.errors import Rejected, ShortfallError


def test_every_error_comes_whole_out_of_another_process():
    made = [Rejected("no text", "cc"), ShortfallError("too little", ["cc"])]
    special = {type(error) for error in made}
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        made += [] if kind in special else [kind("what went wrong")]
    assert len(made) > 8
    for error in made:
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
