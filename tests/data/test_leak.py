from data_samples import write_data_set

from blip_pipelines.data.leak import held_out, leaked
from blip_pipelines.data.pairs import Pairs


def test_an_evaluation_image_among_training_rows_is_named(tmp_path):
    pairs, images = write_data_set(tmp_path, [8, 8])
    view = Pairs.open(pairs, images)
    trained, kept = set(view.select(split="train").keys), set(view.select(split="val").keys)
    assert held_out(pairs) == kept and len(kept) == 4
    assert leaked(kept, [pairs]) == []
    known = sorted(trained)[0]
    (found,) = leaked(kept | {known}, [pairs, pairs])
    assert found.startswith(known[:12]) and "in pairs" in found
