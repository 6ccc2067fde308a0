from prepared import file_hashes, run


def test_the_number_of_workers_changes_no_byte(prepared, tmp_path):
    folder, _ = prepared
    run(folder / "corpus", tmp_path / "out", workers=3)
    assert file_hashes(tmp_path / "out") == file_hashes(folder / "out")


def test_the_size_of_pieces_moves_no_document(prepared, tmp_path):
    folder, manifest = prepared
    other = run(folder / "corpus", tmp_path / "out", piece_bytes=1 << 20)
    assert other["splits"] == manifest["splits"] and other["shards"] == manifest["shards"]
