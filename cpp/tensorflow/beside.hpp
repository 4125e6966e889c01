// FastemaUpdate, for a TensorFlow that does not export what averaging in place needs: 2.20
// and 2.21. It reads averages where they lie and makes new ones beside the old, which
// AssignVariableOp then takes over. Nothing else needs the files beside*.
#pragma once

namespace fastema {

bool register_beside();

}  // namespace fastema
