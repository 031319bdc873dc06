#include "cuda/workspace_rank_major.cuh"

namespace ep::cuda {

const WorkspaceDispatch kTaggedWorkspaceDispatch[] = {
    make_workspace_dispatch<RankMajor<true, false>>(),
    make_workspace_dispatch<RankMajor<true, true>>()};

}  // namespace ep::cuda
