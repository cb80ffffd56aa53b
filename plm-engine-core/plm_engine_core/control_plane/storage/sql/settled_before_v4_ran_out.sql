-- Why a grant was not there to be closed: it was settled before, which the same outcome may hear again even after the run
-- moved on; or the caller's fencing token was replaced; or the call never began.
-- Of a grant that ran out unused, whoever holds the run may still say that its call did not start.
CREATE OR REPLACE FUNCTION engine_settled_before_v4(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := (c ->> 'tenant_id')::uuid;
    v_run_id uuid := (c ->> 'run_id')::uuid;
    v_id     uuid := (c ->> 'grant_id')::uuid;
    v_grant  grants;
BEGIN
    SELECT * INTO v_grant FROM grants WHERE tenant_id = v_tenant AND id = v_id AND run_id = v_run_id
        AND step_index = (c ->> 'step_index')::integer AND attempt = (c ->> 'attempt')::integer FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = v_id;
    END IF;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest = c ->> 'outcome_digest' THEN
        RETURN jsonb_build_object('status', v_grant.outcome, 'replayed', true, 'spent',
            CASE WHEN v_grant.reserved IS NOT NULL THEN engine_spent_v4(v_grant.reserved, v_grant.charged)
                 ELSE engine_spent_v2(v_tenant, v_id) END);
    END IF;
    PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, false);  -- says what is amiss
    IF c ->> 'status' = 'not_started' AND engine_ran_out_v1(v_grant) THEN
        RETURN jsonb_build_object('status', v_grant.outcome, 'replayed', true, 'spent',
            CASE WHEN v_grant.reserved IS NOT NULL THEN engine_spent_v4(v_grant.reserved, v_grant.charged)
                 ELSE engine_spent_v2(v_tenant, v_id) END);
    END IF;
    IF v_grant.state = 'settled' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'grant %s was already settled as %s', v_id, v_grant.outcome);
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
        'grant %s was never begun, so its call cannot have ended as %s', v_id, c ->> 'status');
END
$$;
