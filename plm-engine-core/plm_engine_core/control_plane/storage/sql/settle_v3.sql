-- Closes one grant: the reservation becomes spend, the outcome, artifacts, ledger rows and event are written, the run may be
-- parked. `p_ledger` maps tables to rows, as plm-shared renders them; the grant is held, so nobody else writes their keys.
-- Locks in the order of admission: run, grant, budgets from narrow to wide, stream head. A standing halt does not refuse a
-- settlement: what happened is recorded.
CREATE FUNCTION engine_settle_v3(c jsonb, p_ledger json) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_id      uuid := (c ->> 'grant_id')::uuid;
    v_step    integer := (c ->> 'step_index')::integer;
    v_attempt integer := (c ->> 'attempt')::integer;
    v_status  text := c ->> 'status';
    v_grant   grants;
    v_charged jsonb;
    v_seq     bigint;
BEGIN
    v_grant := engine_hold_grant_v3(v_tenant, v_run_id, v_step, v_attempt, v_id, (c ->> 'fencing_token')::bigint,
        c ->> 'outcome_digest');
    IF p_ledger::text <> '{}' THEN
        PERFORM engine_write_ledger_v1(v_tenant, p_ledger);
    END IF;
    IF v_grant.state = 'settled' THEN
        RETURN jsonb_build_object('status', v_grant.outcome, 'spent', engine_spent_v2(v_tenant, v_id), 'replayed', true);
    END IF;
    IF v_grant.state IN ('issued', 'revoked') AND v_status <> 'not_started' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
            'grant %s was never begun, so its call cannot have ended as %s', v_id, v_status);
    END IF;
    UPDATE grants SET state = 'settled', settled_at = clock_timestamp(), outcome = v_status,
            outcome_digest = c ->> 'outcome_digest'
        WHERE tenant_id = v_tenant AND id = v_id AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt;
    UPDATE run_steps SET state = v_status, output = c -> 'output', error = NULLIF(c -> 'error', 'null'),
            usage = c -> 'usage', evidence = c ->> 'evidence', finished_at = clock_timestamp()
        WHERE tenant_id = v_tenant AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt;
    IF c -> 'artifacts' <> '[]' THEN
        INSERT INTO artifacts (id, tenant_id, trace_id, run_id, mime_type, size_bytes, backend, storage_uri)
            SELECT a.id, v_tenant, c ->> 'trace_id', v_run_id, a.mime_type, a.size_bytes, a.backend, a.storage_uri
            FROM jsonb_to_recordset(c -> 'artifacts')
                AS a (id uuid, mime_type text, size_bytes bigint, backend text, storage_uri text);
    END IF;
    IF v_status = 'outcome_unknown' THEN
        UPDATE run_states SET state = 'outcome_unknown', reason = 'outcome_unknown', message = c #>> '{error,message}',
                lease_owner = NULL, lease_expires_at = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_run_id;
    END IF;
    v_charged := engine_charge_v3(v_tenant, v_id, c -> 'charges');
    v_seq := engine_append_event_v2(v_tenant, 'run/' || v_run_id, 'step_settled', c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('step', v_step, 'attempt', v_attempt, 'grant_id', v_id, 'status', v_status,
            'evidence', c -> 'evidence', 'outcome_digest', c -> 'outcome_digest', 'error', c -> 'error',
            'usage', c -> 'usage', 'spent', v_charged -> 'spent', 'overrun', NULLIF(v_charged -> 'overrun', 'false'),
            'artifacts', NULLIF(c -> 'artifacts', '[]'))));
    RETURN jsonb_build_object('status', v_status, 'spent', v_charged -> 'spent', 'replayed', false);
END
$$;

-- Locks the run and the grant for a settlement, unless the same outcome was settled already, and refuses a caller whose
-- fencing token was replaced.
CREATE FUNCTION engine_hold_grant_v3(
    p_tenant uuid, p_run uuid, p_step integer, p_attempt integer, p_grant uuid, p_fencing bigint, p_digest text
) RETURNS grants
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_held  boolean;
    v_grant grants;
BEGIN
    SELECT fencing_token = p_fencing AND state = 'running' INTO v_held FROM run_states
        WHERE tenant_id = p_tenant AND run_id = p_run FOR UPDATE;
    SELECT * INTO v_grant FROM grants
        WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run AND step_index = p_step AND attempt = p_attempt
        FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = p_grant;
    END IF;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest = p_digest THEN
        RETURN v_grant;
    END IF;
    IF v_held IS NOT TRUE THEN
        PERFORM engine_hold_run_v1(p_tenant, p_run, p_fencing, false);  -- says what is amiss
    END IF;
    IF v_grant.state = 'settled' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'grant %s was already settled as %s', p_grant, v_grant.outcome);
    END IF;
    RETURN v_grant;
END
$$;
