"""DICOM and NIfTI, made by pydicom and nibabel."""

import gzip
import logging

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import tiny_config
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from ddpm_hf.data import pages
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.medical import is_dicom_file, patient_of
from ddpm_hf.data.pages import BadImage
from ddpm_hf.data.reading import count_images, read_image
from ddpm_hf.training import train

NAME = "Doe^Erika"


def dicom(path, pixels, patient="12345", **tags):
    """Write (frames, H, W), (H, W) or, for RGB, (H, W, 3)."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.PatientName, header.PatientID, header.SeriesInstanceUID = NAME, patient, generate_uid()
    bits = 8 * pixels.dtype.itemsize
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    header.Rows, header.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        header.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        header.NumberOfFrames = len(pixels)
    header.BitsAllocated = header.BitsStored = bits
    header.HighBit, header.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
    return path


def ct(seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 4096, (side, side), dtype=np.uint16)


def read(path, **settings):
    return read_image(path, None, **settings).colours


def test_values_are_in_hounsfield_units(tmp_path):
    stored = ct()
    path = dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12, HighBit=11)
    assert (read(path)[..., 0] == stored.astype(int) - 1024).all()
    decoded = Decoder(1, value_range=(-1024, 3071))(path)
    assert (decoded.pixels[0] == stored.astype(np.float32) - 1024).all()
    half = dicom(tmp_path / "b.dcm", stored, RescaleSlope=0.5, RescaleIntercept=0)
    assert (read(half)[..., 0] == stored / 2).all()
    signed = dicom(tmp_path / "c.dcm", stored.astype(np.int16) - 1000)
    assert (read(signed)[..., 0] == stored.astype(int) - 1000).all()


def test_a_range_is_asked_for_and_the_window_is_told(tmp_path):
    path = dicom(
        tmp_path / "a.dcm", ct(), RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 80], WindowWidth=[400, 9]
    )
    with pytest.raises(ValueError, match=r"--value_range BLACK WHITE \(viewers show it between -160 and 240\)"):
        Decoder(1)(path)
    assert Decoder(1, value_range=(-160, 240), clip_values=True)(path).pixels.max() == 240


def test_monochrome1_is_inverted(tmp_path):
    """Its lowest value is white."""
    stored = ct()
    path = dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    assert (read(path)[..., 0] == 4095 - stored.astype(int)).all()
    signed = stored.astype(np.int16) - 2048
    path = dicom(tmp_path / "b.dcm", signed, PhotometricInterpretation="MONOCHROME1")
    assert (read(path)[..., 0] == -1 - signed.astype(int)).all()


def test_eight_bits_and_colours(tmp_path):
    gray = ct().astype(np.uint8)
    found = read(dicom(tmp_path / "a.dcm", gray))
    assert found.dtype == np.uint8
    assert (found[..., 0] == gray).all()
    colour = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    assert (read(dicom(tmp_path / "b.dcm", colour)) == colour).all()
    path = dicom(tmp_path / "c.dcm", gray)
    header = pydicom.dcmread(path)
    header.compress(RLELossless)
    header.save_as(path)
    assert (read(path)[..., 0] == gray).all()


def test_frames_are_images(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 6), dtype=np.uint8)
    path = dicom(tmp_path / "a.dcm", frames)
    assert count_images(path) == 3
    with pytest.raises(ValueError, match="has 3 frames: give --frames all"):
        read(path)
    for k in range(3):
        assert (read(path, frame=k)[..., 0] == frames[k]).all()


def test_broken_files_are_bad_images_whose_reason_tells_nothing_of_the_patient(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", ct())
    content = path.read_bytes()
    for broken in (content[:200], content[:-30], content.replace(b"MONOCHROME2", b"MONOCHROMEX")):
        with pytest.raises(BadImage) as found:
            read(broken)
        assert "Doe" not in str(found.value)
    del_rows = pydicom.dcmread(path)
    del del_rows.Rows
    del_rows.save_as(path)
    with pytest.raises(BadImage, match=r"is a DICOM file without a valid image \(AttributeError\)"):
        read(path)
    monkeypatch.setattr(pages, "MOST_BYTES", 100)
    with pytest.raises(BadImage, match="is too large: 8x8 values are 128 bytes when decoded"):
        read(dicom(tmp_path / "b.dcm", ct()))


def test_a_folder_of_dicom_trains_and_keeps_patients_together_and_secret(tmp_path, caplog, capfd):
    """Files without a suffix are found; neither name nor number of a patient is in the run, the log or the output."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(24):
        settings = {"RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}
        dicom(data / (f"IM{k:04d}" if k % 2 else f"{k}.dcm"), ct(k), patient=f"patient-{k // 4}", **settings)
    (data / "README").write_text("not an image")
    broken = dicom(data / "broken.dcm", ct(), patient="patient-9")
    broken.write_bytes(broken.read_bytes()[:-60])
    assert [is_dicom_file(data / name) for name in ("0.dcm", "IM0001", "README")] == [True, True, False]
    assert patient_of(data / "0.dcm") == patient_of(data / "IM0001") != patient_of(data / "4.dcm")
    settings = {"value_range": [-1024, 3071], "max_bad_fraction": 0.1}
    with caplog.at_level(logging.DEBUG):
        run = train(tiny_config(tmp_path / "run", train_data_dir=str(data), **settings))
    assert (len(run.images), len(run.held_out)) == (20, 4)
    held_out = {np.float32(x).tobytes() for x in run.held_out.pixels.numpy()}
    patients = {k // 4 for k in range(24) if (ct(k)[None].astype(np.float32) - 1024).tobytes() in held_out}
    assert len(patients) == 1
    out, err = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    for told in (out.encode(), err.encode(), caplog.text.encode(), written):
        assert b"Doe" not in told
        assert b"patient-" not in told
    assert "broken.dcm" in (tmp_path / "run/quarantine.csv").read_text()


# ---------------------------------------------------------------- NIfTI


def nifti(path, shape=(6, 8, 10), dtype=np.int16, offset=0):
    """Voxel (x, y, z) has the value 100 x + 10 y + z + offset; x goes right, y to the front and z up."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    volume = (100 * x + 10 * y + z + offset).astype(dtype)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    return volume


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_a_volume_are_upright(tmp_path, suffix):
    volume = nifti(tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert (content[:2] == b"\x1f\x8b") == (suffix == ".nii.gz")
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="--slices"):
        read(path)
    assert [count_images(path, axis) for axis in (0, 1, 2)] == [10, 8, 6]
    axial = read(path, frame=0, slices=0)[..., 0]
    assert axial.shape == (8, 6)
    assert axial[0, 0] == volume[0, 7, 9]  # the front is above, and left is left
    assert axial[-1, -1] == volume[5, 0, 9]
    coronal = read(path, frame=0, slices=1)[..., 0]
    assert (coronal[0, 0], coronal[-1, -1]) == (volume[0, 7, 9], volume[5, 7, 0])  # the head is above


def test_the_affine_decides_what_is_up(tmp_path):
    """A volume stored the other way round is the same volume."""
    volume = nifti(tmp_path / "a.nii")
    turned = nibabel.Nifti1Image(volume[::-1, :, ::-1], np.diag([-1, 1, -1, 1]))
    nibabel.save(turned, tmp_path / "b.nii")
    for axis in (0, 1, 2):
        assert (read(tmp_path / "a.nii", frame=1, slices=axis) == read(tmp_path / "b.nii", frame=1, slices=axis)).all()


def test_a_flat_nifti_is_an_image(tmp_path):
    volume = nifti(tmp_path / "a.nii", shape=(6, 8, 1), dtype=np.uint8)
    found = read(tmp_path / "a.nii")
    assert found.dtype == np.uint8
    assert (found[..., 0] == volume[:, ::-1, 0].T).all()


def test_bombs_and_broken_volumes(tmp_path, monkeypatch):
    nifti(tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    monkeypatch.setattr("ddpm_hf.data.medical.MOST_OF_A_FILE", 1000)
    with pytest.raises(BadImage, match="is too large: it has more than 1,000 bytes when decompressed"):
        read(gzip.compress(content))
    with pytest.raises(BadImage):
        read(content[:400])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3)), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(BadImage, match=r"is a NIfTI file of shape \(4, 4, 4, 3\)"):
        read(tmp_path / "b.nii")


def test_volumes_train(tmp_path):
    for k in range(3):
        nifti(tmp_path / f"data-{k}.nii.gz", offset=1000 * k)
    settings = {"slices": 0, "value_range": [0, 3000], "resolution": 8}
    run = train(tiny_config(tmp_path / "run", train_data_dir=str(tmp_path), **settings))
    assert (len(run.images), len(run.held_out)) == (20, 10)  # a volume is on one side


def test_numbers_in_headers_that_the_file_cannot_hold(tmp_path):
    """They would be an index of two billion frames, or terabytes of voxels."""
    path = dicom(tmp_path / "a.dcm", ct().astype(np.uint8), NumberOfFrames=2**31 - 1)
    with pytest.raises(BadImage, match="is broken: it says that it has 2,147,483,647 frames, and it has"):
        read(path)
    assert count_images(path) == 1
    nifti(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    with pytest.raises(BadImage, match="is cut off: it says that it has 70,362,301,923,326 bytes of values"):
        read(bytes(content), slices=0, frame=0)
