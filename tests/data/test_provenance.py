from data_samples import write_data_set

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.provenance import rows_about


def test_rows_are_found_by_caption_whatever_its_case_or_by_the_beginning_of_a_key(tmp_path):
    pairs, _ = write_data_set(tmp_path, [6, 5], captions_per_image=2)
    view = Pairs.open(pairs)
    caption, key = view.captions([15])[0], str(view.keys[15])
    found = list(rows_about(pairs, f"  {caption.upper().replace(' ', '   ')} "))
    assert {row["caption"] for row in found} == {caption} and key in {row["key"] for row in found}
    of_image = list(rows_about(pairs, key[:10]))
    assert [row["key"] for row in of_image] == [key, key]
    assert list(rows_about(pairs, "nobody wrote this")) == []
