import pytest
import torch

from shardemb.serving.read_table import best_of


@pytest.mark.parametrize("k", [1, 4, 7, 40, 60])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_best_are_those_of_a_stable_sort_however_rows_are_parted(k: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(k * levels)
    scores = torch.randint(levels, (5, 53), generator=generator).float()
    scores[2, 10:] = -torch.inf
    ids = torch.randperm(53, generator=generator)
    by_id = ids.argsort()
    expected = scores[:, by_id].sort(dim=1, descending=True, stable=True)
    best, found = best_of(scores, ids, k)
    assert torch.equal(best, expected.values[:, :k])
    assert torch.equal(found, expected.indices[:, :k])
    parts = [
        best_of(scores[:, part], ids[part], k) for part in torch.arange(53).split([0, 20, 1, 32])
    ]
    merged = best_of(*(torch.cat(part, 1) for part in zip(*parts, strict=True)), k)
    assert torch.equal(merged[0], best)
    assert torch.equal(merged[1], found)


def test_a_score_that_is_no_number_comes_first_as_topk_has_it() -> None:
    best, found = best_of(torch.tensor([[1.0, torch.nan, 1.0, 1.0]]), torch.tensor([9, 8, 7, 6]), 3)
    assert found.tolist() == [[8, 6, 7]]
    assert best[0, 0].isnan()
