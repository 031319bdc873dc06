// Nothing that runs here uses the copy engine.
#pragma once
