import io

from data_samples import write_data_set
from PIL import Image

from blip_pipelines.data.contact_sheet import COLUMNS, contact_sheet


def test_sheet_shows_a_few_training_rows_and_equal_data_give_equal_bytes(tmp_path):
    pairs, images = write_data_set(tmp_path, [12, 12])
    sheet = contact_sheet(pairs, images, count=10)
    assert sheet == contact_sheet(pairs, images, count=10)
    few, more = (Image.open(io.BytesIO(contact_sheet(pairs, images, count=count))) for count in (COLUMNS, COLUMNS + 1))
    assert more.height > few.height == Image.open(io.BytesIO(contact_sheet(pairs, images, count=1))).height
