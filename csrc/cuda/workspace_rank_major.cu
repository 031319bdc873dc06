#include "cuda/workspace_rank_major.cuh"

namespace ep::cuda {

const WorkspaceDispatch kRankMajorWorkspaceDispatch[] = {
    make_workspace_dispatch<RankMajor<false, false>>(),
    make_workspace_dispatch<RankMajor<false, true>>()};

}  // namespace ep::cuda
